// Norms of one row, and of one head with its rotation.
#pragma once

#include "vectors.h"

// sum_i x[i]^2
inline float squares(const float* x, int64_t width) {
    const int64_t whole = width / LANES * LANES;
    vec all = {};
    for (int64_t i = 0; i < whole; i += LANES) all = mul_add(load(x + i), load(x + i), all);
    float total = sum(all);
    for (int64_t i = whole; i < width; i++) total += x[i] * x[i];
    return total;
}

// out = weight * x / rms(x); returns 1 / rms(x).
inline float rms_norm(float* out, const float* x, const float* weight, int64_t width, float eps) {
    const int64_t whole = width / LANES * LANES;
    const float scale = 1.0f / std::sqrt(squares(x, width) / width + eps);
    for (int64_t i = 0; i < whole; i += LANES) store(out + i, load(x + i) * scale * load(weight + i));
    for (int64_t i = whole; i < width; i++) out[i] = x[i] * scale * weight[i];
    return scale;
}

// One head: its norm where the model has weights for it, then rotation of dimensions i and i + d/2 together; times
// `scale`. Returns 1 / rms(x), 1 without a norm. out may be x. DIM 0: any width.
template <int64_t DIM>
inline float place_head(float* out, const float* x, const float* weight, const float* cos, const float* sin, float eps,
                        float scale, int64_t dim) {
    const int64_t d = DIM ? DIM : dim, half = d / 2;
    const float rstd = weight ? 1.0f / std::sqrt(squares(x, d) / d + eps) : 1.0f;
    const float factor = rstd * scale;
#pragma omp simd
    for (int64_t i = 0; i < half; i++) {
        const float a = x[i] * factor * (weight ? weight[i] : 1.0f);
        const float b = x[i + half] * factor * (weight ? weight[i + half] : 1.0f);
        out[i] = a * cos[i] - b * sin[i];
        out[i + half] = b * cos[i] + a * sin[i];
    }
    return rstd;
}

using HeadOperation = float (*)(float*, const float*, const float*, const float*, const float*, float, float, int64_t);

inline HeadOperation head_operation(int64_t dim) {
    switch (dim) {
        case 16: return place_head<16>;
        case 32: return place_head<32>;
        case 64: return place_head<64>;
        case 128: return place_head<128>;
        default: return place_head<0>;
    }
}
