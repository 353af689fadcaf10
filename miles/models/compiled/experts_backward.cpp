// The experts of `experts.h`, backward; a unit of its own, so that both are compiled at once.

#include "experts.h"

extern "C" {

// Gradients of x, weights, gate_up and down for the gradient of out; all are overwritten.
void miles_experts_backward(const ExpertSizes* sizes, const float* grad, const float* x, const float* weights, const float* gate_up,
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
