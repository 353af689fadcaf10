// Matrix products rows x weights^T. Weights [N, K] are packed into panels of PANEL columns: for each k the
// PANEL numbers of one panel lie side by side. Every output is one running sum over k, whatever the number of
// rows: a row's bits do not depend on the batch.
#pragma once

#include <algorithm>

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
            left[r] = mul_add(value, first, left[r]);
            right[r] = mul_add(value, second, right[r]);
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

// Panels of one matrix. Where `half` is given, each panel holds LANES columns and the LANES columns `half`
// further on: a gate and its up projection.
struct Matrix {
    float* data = nullptr;
    int64_t inputs = 0, panels = 0;

    static int64_t panels_of(int64_t outputs, int64_t half = 0) {
        return half ? padded(half, LANES) / LANES : padded(outputs, PANEL) / PANEL;
    }
    static int64_t floats(int64_t outputs, int64_t inputs, int64_t half = 0) {
        return panels_of(outputs, half) * PANEL * inputs;
    }

    // `room`: for `floats` of them.
    void pack(float* room, const float* weights, int64_t outputs, int64_t inputs_, int64_t half = 0) {
        data = room;
        inputs = inputs_;
        panels = panels_of(outputs, half);
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

    // The matrix [inputs, outputs] itself instead of a transposed one; outputs are whole panels.
    void pack_plain(float* room, const float* weights, int64_t outputs, int64_t inputs_) {
        data = room;
        inputs = inputs_;
        panels = outputs / PANEL;
        for (int64_t n = 0; n < outputs; n += PANEL)
            for (int64_t k = 0; k < inputs; k++, room += PANEL) std::memcpy(room, weights + k * outputs + n, PANEL * 4);
    }

  private:
    static void pack_square(float* at, const float* const* columns, int64_t first, int64_t stop) {
        for (int64_t lane = 0; lane < PANEL; lane++)
            for (int64_t k = first; k < stop; k++)
                at[(k - first) * PANEL + lane] = columns[lane] ? columns[lane][k] : 0.0f;
    }
};

// epilogue(row, panel, left, right) for every row and panel of x [rows, inputs] @ matrix.
template <class Epilogue>
inline void product(const float* x, int64_t stride, int64_t rows, const Matrix& matrix, Epilogue&& epilogue) {
    for (int64_t panel = 0; panel < matrix.panels; panel++)
        for (int64_t row = 0; row < rows; row += TILE_ROWS)
            tile_of<TILE_ROWS>(rows - row, x + row * stride, stride, 1, matrix.data + panel * PANEL * matrix.inputs, PANEL,
                               matrix.inputs, [&](int r, vec left, vec right) { epilogue(row + r, panel, left, right); });
}

// out[row] = x @ matrix + bias [PANEL * panels] where there is one; out has room for whole panels.
inline void product_into(float* out, int64_t out_stride, const float* x, int64_t stride, int64_t rows,
                         const Matrix& matrix, const float* bias = nullptr) {
    product(x, stride, rows, matrix, [&](int64_t row, int64_t panel, vec left, vec right) {
        float* at = out + row * out_stride + panel * PANEL;
        store(at, bias ? left + load(bias + panel * PANEL) : left);
        store(at + LANES, bias ? right + load(bias + panel * PANEL + LANES) : right);
    });
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
