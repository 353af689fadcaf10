// The experts of `experts.h`, forward.

#include "experts.h"

extern "C" {

// order [choices] and starts [experts + 1] are filled in: choice order[row] is computed in row, rows of expert e
// are starts[e] : starts[e + 1]. projected [choices, 2 width]: [gate, up] of every row.
void miles_experts(const ExpertSizes* sizes, const float* x, const int64_t* ids, const float* weights, const float* gate_up,
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
}
