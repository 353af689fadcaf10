// RMSNorm over rows of any width.

#include "norms.h"

extern "C" {

// out = weight * x * rstd, rstd[row] = 1 / sqrt(mean(x^2) + eps).
void miles_norm(const float* x, const float* weight, float eps, int64_t rows, int64_t width, float* out, float* rstd) {
    for (int64_t r = 0; r < rows; r++) rstd[r] = rms_norm(out + r * width, x + r * width, weight, width, eps);
}

// With n = x * rstd: grad_x = rstd * (grad * weight - n * mean(grad * weight * n)), grad_weight = sum grad * n.
void miles_norm_backward(const float* grad, const float* x, const float* weight, const float* rstd, int64_t rows, int64_t width,
                         float* grad_x, float* grad_weight) {
    const int64_t whole = width / LANES * LANES;
    std::memset(grad_weight, 0, width * 4);
    for (int64_t r = 0; r < rows; r++, x += width, grad += width, grad_x += width) {
        vec products = {};
        for (int64_t i = 0; i < whole; i += LANES) products = mul_add(load(grad + i) * load(weight + i), load(x + i), products);
        float along = sum(products);
        for (int64_t i = whole; i < width; i++) along += grad[i] * weight[i] * x[i];
        const float scale = rstd[r], back = along * scale * scale / width;
        for (int64_t i = 0; i < whole; i += LANES) {
            const vec g = load(grad + i), value = load(x + i);
            store(grad_weight + i, mul_add(scale, g * value, load(grad_weight + i)));
            store(grad_x + i, scale * mul_add(-back, value, g * load(weight + i)));
        }
        for (int64_t i = whole; i < width; i++) {
            grad_weight[i] += grad[i] * x[i] * scale;
            grad_x[i] = scale * (grad[i] * weight[i] - x[i] * back);
        }
    }
}
}
