// SwiGLU experts: out[t] = sum_slot weights[t, slot] down[e] (silu(gate) * up), [gate, up] = gate_up[e] x[t],
// e = ids[t, slot]. Choices (t * k + slot) are sorted by expert and computed BLOCK_ROWS at a time.
#pragma once

#include <algorithm>

#include "products.h"

struct ExpertSizes {
    int64_t tokens, top_k, experts, hidden, width;
    int64_t choices() const { return tokens * top_k; }
};

// out[row] = from[token of choice order[row]]
inline void gather(float* out, const float* from, const int64_t* order, int64_t rows, int64_t top_k, int64_t width) {
    for (int64_t r = 0; r < rows; r++) std::memcpy(out + r * width, from + order[r] / top_k * width, width * 4);
}

inline void add_to(float* at, float factor, vec left, vec right) {
    store(at, mul_add(factor, left, load(at)));
    store(at + LANES, mul_add(factor, right, load(at + LANES)));
}

// operation(expert, first row, rows) for blocks of sorted choices; begin(expert) before the first of each.
template <class Begin, class Operation>
inline void each_block(const int64_t* starts, int64_t experts, Begin&& begin, Operation&& operation) {
    for (int64_t e = 0; e < experts; e++) {
        if (starts[e] == starts[e + 1]) continue;
        begin(e);
        for (int64_t row = starts[e]; row < starts[e + 1]; row += BLOCK_ROWS)
            operation(e, row, std::min(BLOCK_ROWS, starts[e + 1] - row));
    }
}
