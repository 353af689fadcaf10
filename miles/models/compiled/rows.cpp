// What the trainer computes row by row as the decode kernel does: products, the gated activation, a router, log-probs.

#include "products.h"
#include "softmax.h"

namespace {

constexpr int64_t ROOM = 1 << 18;  // floats of the rows that meet one panel after another
constexpr int64_t FEWEST_ROWS = 192;

void store_some(float* at, vec x, int64_t count) { std::memcpy(at, &x, std::min(count, LANES) * 4); }

vec load_some(const float* at, int64_t count) {
    vec x = {};
    std::memcpy(&x, at, std::min(count, LANES) * 4);
    return x;
}

}  // namespace

extern "C" {

// out [rows, outputs] = x [rows, inputs] @ weights [outputs, inputs]^T + bias [outputs] (may be null).
void miles_linear(const float* x, const float* weights, const float* bias, int64_t rows, int64_t inputs, int64_t outputs,
                  float* out) {
    Buffer room(PANEL * inputs);
    const int64_t most = std::max(FEWEST_ROWS, ROOM / inputs);
    for (int64_t first = 0; first < rows; first += most)
        for (int64_t n = 0; n < outputs; n += PANEL) {
            const int64_t columns = std::min(PANEL, outputs - n);
            Matrix panel;
            panel.pack(room, weights + n * inputs, columns, inputs);
            const vec left_bias = bias ? load_some(bias + n, columns) : vec{};
            const vec right_bias = bias && columns > LANES ? load_some(bias + n + LANES, columns - LANES) : vec{};
            float* to = out + first * outputs + n;
            product(x + first * inputs, inputs, std::min(most, rows - first), panel,
                    [&](int64_t row, int64_t, vec left, vec right) {
                        if (bias) left += left_bias, right += right_bias;
                        float* at = to + row * outputs;
                        store_some(at, left, columns);
                        if (columns > LANES) store_some(at + LANES, right, columns - LANES);
                    });
        }
}

// out [rows, width] = silu(gate) * up of gate_up [rows, 2 width].
void miles_swiglu(const float* gate_up, int64_t rows, int64_t width, float* out) {
    for (int64_t r = 0; r < rows; r++, gate_up += 2 * width, out += width)
        for (int64_t i = 0; i < width; i += LANES) {
            const int64_t left = width - i;
            store_some(out + i, silu(load_some(gate_up + i, left)) * load_some(gate_up + width + i, left), left);
        }
}

// Softmax over each row of logits [rows, experts].
void miles_router_scores(const float* logits, int64_t rows, int64_t experts, float* out) {
    Buffer row(experts);
    for (int64_t r = 0; r < rows; r++, logits += experts, out += experts) {
        std::memcpy(row, logits, experts * 4);
        router_scores(row, experts);
        std::memcpy(out, row, experts * 4);
    }
}

// ids [rows, k]: the experts with the highest of scores [rows, experts], best first.
void miles_choose_experts(const float* scores, int64_t rows, int64_t experts, int64_t k, int64_t* ids) {
    Buffer row(experts);
    for (int64_t r = 0; r < rows; r++, scores += experts, ids += k) {
        std::memcpy(row, scores, experts * 4);
        choose_experts(static_cast<float*>(row), experts, k, ids);
    }
}

// weights [rows, k] of chosen experts ids [rows, k].
void miles_weigh_experts(const float* scores, const int64_t* ids, int64_t rows, int64_t experts, int64_t k,
                         int64_t normed, float* weights) {
    for (int64_t r = 0; r < rows; r++, scores += experts, ids += k, weights += k) {
        for (int64_t j = 0; j < k; j++) weights[j] = scores[ids[j]];
        weigh_experts(weights, k, normed);
    }
}

// out = log_softmax(logits / temperatures) over each row of logits [rows, vocab]; temperatures [rows].
void miles_log_softmax(const float* logits, const float* temperatures, int64_t rows, int64_t vocab, float* out) {
    Buffer row(vocab), weights(vocab);
    for (int64_t r = 0; r < rows; r++, logits += vocab, out += vocab) {
        std::memcpy(row, logits, vocab * 4);
        const Masses masses = weigh_logits(row, weights, vocab, temperatures[r]);
        for (int64_t i = 0; i < vocab; i++) out[i] = masses.log_prob(row[i]);
    }
}
}
