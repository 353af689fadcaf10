// Matrix products rows x weights^T. Weights [N, K] are packed into panels of PANEL columns: for each k the
// PANEL numbers of one panel lie side by side. Every output is one running sum over k, whatever the number of
// rows: a row's bits do not depend on the batch.
#pragma once

#include <algorithm>

#include "vectors.h"

constexpr int64_t PANEL = 2 * LANES;

// Panels of one matrix. Where `half` is given, each panel holds LANES columns and the LANES columns `half`
// further on: a gate and its up projection.
struct Matrix {
    float* data = nullptr;
    int64_t inputs = 0, panels = 0;

    void pack(Arena& arena, const float* weights, int64_t outputs, int64_t inputs_, int64_t half = 0) {
        const int64_t covered = half ? half : outputs, step = half ? LANES : PANEL;
        inputs = inputs_;
        panels = padded(covered, step) / step;
        if (!data) data = arena.take(panels * PANEL * inputs);
        for (int64_t panel = 0; panel < panels; panel++) {
            const float* columns[PANEL];
            for (int64_t lane = 0; lane < PANEL; lane++) {
                const int64_t in_half = panel * LANES + lane % LANES;
                const int64_t row = half ? in_half + lane / LANES * half : panel * PANEL + lane;
                columns[lane] = (half ? in_half < half : row < outputs) ? weights + row * inputs : nullptr;
            }
            // In squares, so that whole cache lines are read and written.
            for (int64_t k = 0; k < inputs; k += LANES)
                pack_square(data + (panel * inputs + k) * PANEL, columns, k, std::min(k + LANES, inputs));
        }
    }

    static void pack_square(float* at, const float* const* columns, int64_t first, int64_t stop) {
        for (int64_t lane = 0; lane < PANEL; lane++)
            for (int64_t k = first; k < stop; k++)
                at[(k - first) * PANEL + lane] = columns[lane] ? columns[lane][k] : 0.0f;
    }
};

template <int ROWS, class Epilogue>
inline void tile(const float* x, int64_t stride, const float* panel, int64_t inputs, Epilogue&& epilogue) {
    vec left[ROWS], right[ROWS];
#pragma GCC unroll 12
    for (int r = 0; r < ROWS; r++) left[r] = right[r] = vec{};
    for (int64_t k = 0; k < inputs; k++) {
        const vec first = load(panel + k * PANEL), second = load(panel + k * PANEL + LANES);
#pragma GCC unroll 12
        for (int r = 0; r < ROWS; r++) {
            const vec value = spread(x[r * stride + k]);
            left[r] += value * first;
            right[r] += value * second;
        }
    }
#pragma GCC unroll 12
    for (int r = 0; r < ROWS; r++) epilogue(r, left[r], right[r]);
}

template <int ROWS, class Epilogue>
inline void tile_of(int rows, const float* x, int64_t stride, const float* panel, int64_t inputs, Epilogue&& epilogue) {
    if (rows == ROWS)
        tile<ROWS>(x, stride, panel, inputs, epilogue);
    else if constexpr (ROWS > 1)
        tile_of<ROWS - 1>(rows, x, stride, panel, inputs, epilogue);
}

// epilogue(row, panel, left, right) for every row and panel of x [rows, inputs] @ matrix.
template <class Epilogue>
inline void product(const float* x, int64_t stride, int64_t rows, const Matrix& matrix, Epilogue&& epilogue) {
    for (int64_t panel = 0; panel < matrix.panels; panel++) {
        const float* weights = matrix.data + panel * PANEL * matrix.inputs;
        for (int64_t row = 0; row < rows; row += TILE_ROWS) {
            const int count = rows - row < TILE_ROWS ? rows - row : TILE_ROWS;
            tile_of<TILE_ROWS>(count, x + row * stride, stride, weights, matrix.inputs,
                               [&](int r, vec left, vec right) { epilogue(row + r, panel, left, right); });
        }
    }
}

// out[row] (= or +=) x @ matrix, bias optional; out has room for whole panels.
inline void product_into(float* out, int64_t out_stride, const float* x, int64_t stride, int64_t rows,
                         const Matrix& matrix) {
    product(x, stride, rows, matrix, [&](int64_t row, int64_t panel, vec left, vec right) {
        float* at = out + row * out_stride + panel * PANEL;
        store(at, left);
        store(at + LANES, right);
    });
}

inline void product_added(float* out, int64_t out_stride, const float* x, int64_t stride, int64_t rows,
                          const Matrix& matrix) {
    product(x, stride, rows, matrix, [&](int64_t row, int64_t panel, vec left, vec right) {
        float* at = out + row * out_stride + panel * PANEL;
        store(at, load(at) + left);
        store(at + LANES, load(at + LANES) + right);
    });
}

// silu(x @ gate) * (x @ up) of a matrix packed with `half`; out [rows, half], room for whole vectors.
inline void gated_product(float* out, int64_t out_stride, const float* x, int64_t stride, int64_t rows,
                          const Matrix& matrix) {
    product(x, stride, rows, matrix, [&](int64_t row, int64_t panel, vec gate, vec up) {
        store(out + row * out_stride + panel * LANES, silu(gate) * up);
    });
}
