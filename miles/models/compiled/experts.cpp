// SwiGLU experts: out[t] = sum_slot weights[t, slot] down[e] (silu(gate) * up), [gate, up] = gate_up[e] x[t],
// e = ids[t, slot]. Choices (t * k + slot) are sorted by expert and computed BLOCK_ROWS at a time.

#include <algorithm>

#include "products.h"

namespace {

struct Sizes {
    int64_t tokens, top_k, experts, hidden, width;
    int64_t choices() const { return tokens * top_k; }
};

// out[row] = from[token of choice order[row]]
void gather(float* out, const float* from, const int64_t* order, int64_t rows, int64_t top_k, int64_t width) {
    for (int64_t r = 0; r < rows; r++) std::memcpy(out + r * width, from + order[r] / top_k * width, width * 4);
}

void add_to(float* at, float factor, vec left, vec right) {
    store(at, mul_add(factor, left, load(at)));
    store(at + LANES, mul_add(factor, right, load(at + LANES)));
}

// operation(expert, first row, rows) for blocks of sorted choices; begin(expert) before the first of each.
template <class Begin, class Operation>
void each_block(const int64_t* starts, int64_t experts, Begin&& begin, Operation&& operation) {
    for (int64_t e = 0; e < experts; e++) {
        if (starts[e] == starts[e + 1]) continue;
        begin(e);
        for (int64_t row = starts[e]; row < starts[e + 1]; row += BLOCK_ROWS)
            operation(e, row, std::min(BLOCK_ROWS, starts[e + 1] - row));
    }
}

}  // namespace

extern "C" {

// order [choices] and starts [experts + 1] are filled in: choice order[row] is computed in row, rows of expert e
// are starts[e] : starts[e + 1]. projected [choices, 2 width]: [gate, up] of every row.
void miles_experts(const Sizes* sizes, const float* x, const int64_t* ids, const float* weights, const float* gate_up,
                   const float* down, float* out, float* projected, int64_t* order, int64_t* starts) {
    const int64_t tokens = sizes->tokens, k = sizes->top_k, experts = sizes->experts;
    const int64_t hidden = sizes->hidden, width = sizes->width;
    std::fill(starts, starts + experts + 1, 0);
    for (int64_t c = 0; c < sizes->choices(); c++) starts[ids[c] + 1]++;
    for (int64_t e = 0; e < experts; e++) starts[e + 1] += starts[e];
    std::vector<int64_t> next(starts, starts + experts);
    for (int64_t c = 0; c < sizes->choices(); c++) order[next[ids[c]]++] = c;

    Buffer rows(BLOCK_ROWS * hidden), active(BLOCK_ROWS * width);
    Buffer up_room(2 * width * hidden), down_room(width * hidden);
    Matrix up_panels, down_panels;
    std::memset(out, 0, tokens * hidden * 4);
    each_block(
        starts, experts,
        [&](int64_t e) {
            up_panels.pack(up_room, gate_up + e * 2 * width * hidden, 2 * width, hidden, width);
            down_panels.pack(down_room, down + e * hidden * width, hidden, width);
        },
        [&](int64_t, int64_t first, int64_t count) {
            float* found = projected + first * 2 * width;
            gather(rows, x, order + first, count, k, hidden);
            product(rows, hidden, count, up_panels, [&](int64_t row, int64_t panel, vec gate, vec up) {
                store(found + row * 2 * width + panel * LANES, gate);
                store(found + (row * 2 + 1) * width + panel * LANES, up);
                store(active + row * width + panel * LANES, silu(gate) * up);
            });
            product(active, width, count, down_panels, [&](int64_t row, int64_t panel, vec left, vec right) {
                const int64_t c = order[first + row];
                add_to(out + c / k * hidden + panel * PANEL, weights[c], left, right);
            });
        });
}

// Gradients of x, weights, gate_up and down for the gradient of out; all are overwritten.
void miles_experts_backward(const Sizes* sizes, const float* grad, const float* x, const float* weights, const float* gate_up,
                            const float* down, const float* projected, const int64_t* order, const int64_t* starts,
                            float* grad_x, float* grad_weights, float* grad_gate_up, float* grad_down) {
    const int64_t tokens = sizes->tokens, k = sizes->top_k, experts = sizes->experts;
    const int64_t hidden = sizes->hidden, width = sizes->width;
    Buffer rows(BLOCK_ROWS * hidden), grads(BLOCK_ROWS * hidden), grad_active(BLOCK_ROWS * width), active(BLOCK_ROWS * width);
    Buffer grad_projected(BLOCK_ROWS * 2 * width), up_room(2 * width * hidden), down_room(width * hidden);
    Matrix up_panels, down_panels;
    std::memset(grad_x, 0, tokens * hidden * 4);
    std::memset(grad_gate_up, 0, experts * 2 * width * hidden * 4);
    std::memset(grad_down, 0, experts * width * hidden * 4);
    each_block(
        starts, experts,
        [&](int64_t e) {
            up_panels.pack_plain(up_room, gate_up + e * 2 * width * hidden, hidden, 2 * width);
            down_panels.pack_plain(down_room, down + e * hidden * width, width, hidden);
        },
        [&](int64_t e, int64_t first, int64_t count) {
            gather(rows, x, order + first, count, k, hidden);
            gather(grads, grad, order + first, count, k, hidden);
            product_into(grad_active, width, grads, hidden, count, down_panels);
            for (int64_t r = 0; r < count; r++) {
                const int64_t c = order[first + r];
                const float *gates = projected + (first + r) * 2 * width, *ups = gates + width;
                float *to_gate = grad_projected + r * 2 * width, *to_up = to_gate + width;
                vec along = {};
                for (int64_t i = 0; i < width; i += LANES) {
                    const vec gate = load(gates + i), up = load(ups + i), share = 1.0f / (1.0f + exponential(-gate));
                    const vec lit = gate * share, found = load(grad_active + r * width + i), scaled = found * weights[c];
                    along = mul_add(found * lit, up, along);
                    store(active + r * width + i, weights[c] * lit * up);
                    store(to_up + i, scaled * lit);
                    store(to_gate + i, scaled * up * mul_add(lit, 1.0f - share, share));
                }
                grad_weights[c] = sum(along);
            }
            add_outer(grad_down + e * hidden * width, grads, hidden, active, width, count);
            add_outer(grad_gate_up + e * 2 * width * hidden, grad_projected, 2 * width, rows, hidden, count);
            product(grad_projected, 2 * width, count, up_panels, [&](int64_t row, int64_t panel, vec left, vec right) {
                add_to(grad_x + order[first + row] / k * hidden + panel * PANEL, 1.0f, left, right);
            });
        });
}
}
