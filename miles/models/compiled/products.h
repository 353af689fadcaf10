// Matrix products of a few dozen rows at a time. All widths are whole panels.
#pragma once

#include "vectors.h"

constexpr int64_t PANEL = 2 * LANES;
constexpr int64_t BLOCK_ROWS = 48;  // a multiple of every TILE_ROWS

// left, right[row] = sum_k a[row * row_step + k * k_step] * b[k * b_step ...], two vectors of columns.
template <int ROWS, class Epilogue>
inline void tile(const float* a, int64_t row_step, int64_t k_step, const float* b, int64_t b_step, int64_t count,
                 Epilogue&& epilogue) {
    vec left[ROWS], right[ROWS];
#pragma GCC unroll 12
    for (int r = 0; r < ROWS; r++) left[r] = right[r] = vec{};
    for (int64_t k = 0; k < count; k++, a += k_step, b += b_step) {
        const vec first = load(b), second = load(b + LANES);
#pragma GCC unroll 12
        for (int r = 0; r < ROWS; r++) {
            const vec value = spread(a[r * row_step]);
            left[r] += value * first;
            right[r] += value * second;
        }
    }
#pragma GCC unroll 12
    for (int r = 0; r < ROWS; r++) epilogue(r, left[r], right[r]);
}

template <int ROWS, class Epilogue>
inline void tile_of(int64_t rows, const float* a, int64_t row_step, int64_t k_step, const float* b, int64_t b_step,
                    int64_t count, Epilogue&& epilogue) {
    if (rows >= ROWS)
        tile<ROWS>(a, row_step, k_step, b, b_step, count, epilogue);
    else if constexpr (ROWS > 1)
        tile_of<ROWS - 1>(rows, a, row_step, k_step, b, b_step, count, epilogue);
}

// A matrix [inputs, outputs] as panels of PANEL columns, each [inputs, PANEL]; element (k, n) is at
// from[k * k_step + n * n_step].
inline void pack(float* to, const float* from, int64_t inputs, int64_t outputs, int64_t k_step, int64_t n_step) {
    for (int64_t n = 0; n < outputs; n += PANEL)
        for (int64_t k = 0; k < inputs; k++)
            for (int64_t i = 0; i < PANEL; i++) *to++ = from[k * k_step + (n + i) * n_step];
}

// epilogue(row, column, left, right) for all of a [rows, inputs] @ packed [inputs, outputs].
template <class Epilogue>
inline void product(const float* a, int64_t rows, int64_t inputs, const float* packed, int64_t outputs,
                    Epilogue&& epilogue) {
    for (int64_t n = 0; n < outputs; n += PANEL)
        for (int64_t row = 0; row < rows; row += TILE_ROWS)
            tile_of<TILE_ROWS>(rows - row, a + row * inputs, inputs, 1, packed + n * inputs, PANEL, inputs,
                               [&](int r, vec left, vec right) { epilogue(row + r, n, left, right); });
}

// out [left_width, right_width] += a^T b of a [rows, left_width], b [rows, right_width].
inline void add_outer(float* out, const float* a, int64_t left_width, const float* b, int64_t right_width, int64_t rows) {
    for (int64_t n = 0; n < right_width; n += PANEL)
        for (int64_t m = 0; m < left_width; m += TILE_ROWS)
            tile_of<TILE_ROWS>(left_width - m, a + m, 1, left_width, b + n, right_width, rows,
                               [&](int r, vec left, vec right) {
                                   float* at = out + (m + r) * right_width + n;
                                   store(at, load(at) + left);
                                   store(at + LANES, load(at + LANES) + right);
                               });
}
