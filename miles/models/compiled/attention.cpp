// Attention of short segments, some of which continue a prompt, from the projected heads on: norms of queries and
// keys where there are any, rotation of dimensions i and i + d/2 together, causal softmax attention.
//
// A token sees its segment up to itself and, where the segment continues a prompt, all of that prompt. d is whole
// vectors. Heads of a row: queries, keys, values.

#include <algorithm>

#include "cached_attention.h"
#include "norms.h"

extern "C" {
struct Heads {
    int64_t tokens, queries, keys, d, segments;
    const int64_t *starts, *prompts;  // [segments + 1]; [segments], the segment that is continued, -1 for none
    const float *q_norm, *k_norm;     // [d] or null
    const float* rotation;            // [tokens, d / 2, 2]: cos, sin
    float eps;

    int64_t row() const { return (queries + 2 * keys) * d; }
    int64_t turned_row() const { return (queries + keys) * d; }
};
}

namespace {

// The way back: grad_x of x, and grad_weight is added to.
void place_backward(float* grad_x, float* grad_weight, const float* grad, const float* x, const float* weight,
                    const float* rotation, float rstd, float scale, int64_t d) {
    const int64_t half = d / 2;
    for (int64_t i = 0; i < half; i++) {
        const float cos = rotation[2 * i], sin = rotation[2 * i + 1];
        grad_x[i] = scale * (grad[i] * cos + grad[i + half] * sin);
        grad_x[i + half] = scale * (grad[i + half] * cos - grad[i] * sin);
    }
    if (!weight) return;
    vec products = {};
    for (int64_t i = 0; i < d; i += LANES) products = mul_add(load(grad_x + i) * load(weight + i), load(x + i), products);
    const float back = sum(products) * rstd * rstd / d;
    for (int64_t i = 0; i < d; i += LANES) {
        const vec g = load(grad_x + i), value = load(x + i);
        store(grad_weight + i, mul_add(rstd, g * value, load(grad_weight + i)));
        store(grad_x + i, rstd * mul_add(-back, value, g * load(weight + i)));
    }
}

// out += factor * x
void add_scaled(float* out, const float* x, float factor, int64_t d) {
    for (int64_t i = 0; i < d; i += LANES) store(out + i, mul_add(factor, load(x + i), load(out + i)));
}

// What a segment's queries may see: the rows of its prompt, then its own.
class Visible {
  public:
    Visible(const Heads& heads, int64_t segment) : start_(heads.starts[segment]), stop_(heads.starts[segment + 1]) {
        const int64_t prompt = heads.prompts[segment];
        if (prompt >= 0) prompt_ = heads.starts[prompt], before_ = heads.starts[prompt + 1] - prompt_;
    }
    int64_t count() const { return before_ + stop_ - start_; }
    int64_t before() const { return before_; }
    int64_t first_query() const { return start_; }
    int64_t row(int64_t s) const { return s < before_ ? prompt_ + s : start_ + s - before_; }

  private:
    int64_t start_, stop_, prompt_ = 0, before_ = 0;
};

int64_t widest(const Heads& heads) {
    int64_t most = 0;
    for (int64_t m = 0; m < heads.segments; m++) most = std::max(most, Visible(heads, m).count());
    return padded(most, LANES);
}

// across[i][s] = from[row of s][i], 0 behind the last
void lay_across(float* across, const float* from, int64_t row_size, const Visible& seen, int64_t width, int64_t d) {
    for (int64_t s = 0; s < seen.count(); s++) {
        const float* x = from + seen.row(s) * row_size;
        for (int64_t i = 0; i < d; i++) across[i * width + s] = x[i];
    }
    for (int64_t s = seen.count(); s < width; s++)
        for (int64_t i = 0; i < d; i++) across[i * width + s] = 0;
}

}  // namespace

extern "C" {

// turned [tokens, (queries + keys) d]: what attends, queries scaled. rstd [tokens, queries + keys], log_sums
// [tokens, queries]: for backward. out [tokens, queries * d].
void miles_attention(const Heads* given, const float* x, float* turned, float* rstd, float* log_sums, float* out) {
    const Heads& h = *given;
    const int64_t d = h.d, group = h.queries / h.keys, heads = h.queries + h.keys;
    const float scale = 1.0f / std::sqrt(static_cast<float>(d));
    const HeadOperation place_one = head_operation(d);
    Buffer cos(d / 2), sin(d / 2);
    for (int64_t t = 0; t < h.tokens; t++) {
        for (int64_t i = 0; i < d / 2; i++) cos[i] = h.rotation[t * d + 2 * i], sin[i] = h.rotation[t * d + 2 * i + 1];
        for (int64_t n = 0; n < heads; n++) {
            const bool query = n < h.queries;
            rstd[t * heads + n] = place_one(turned + t * h.turned_row() + n * d, x + t * h.row() + n * d,
                                            query ? h.q_norm : h.k_norm, cos, sin, h.eps, query ? scale : 1.0f, d);
        }
    }
    const int64_t most = widest(h);
    Buffer keys(most * d), values(most * d), scores(4 * most);
    const Cache cache{keys, values, 1, 1, most / LANES, d, d};
    for (int64_t m = 0; m < h.segments; m++) {
        const Visible seen(h, m);
        for (int64_t kv = 0; kv < h.keys; kv++) {
            for (int64_t s = 0; s < seen.count(); s++)
                cache.write(0, s, turned + seen.row(s) * h.turned_row() + (h.queries + kv) * d,
                            x + seen.row(s) * h.row() + (heads + kv) * d);
            for (int64_t s = seen.before(); s < seen.count(); s++) {
                const int64_t t = seen.row(s), n = kv * group;
                attend(cache, 0, turned + t * h.turned_row() + n * d, d, group, s + 1, scores, most,
                       out + (t * h.queries + n) * d, d, log_sums + t * h.queries + n);
            }
        }
    }
}

// From gradients of turned queries and keys to those of heads: grad_x [tokens, row], whose values are left alone,
// grad_q_norm and grad_k_norm [d] are overwritten.
void miles_heads_backward(const Heads* given, const float* grad_turned, const float* x, const float* rstd, float* grad_x,
                          float* grad_q_norm, float* grad_k_norm) {
    const Heads& h = *given;
    const int64_t d = h.d;
    const float scale = 1.0f / std::sqrt(static_cast<float>(d));
    if (h.q_norm) std::memset(grad_q_norm, 0, d * 4);
    if (h.k_norm) std::memset(grad_k_norm, 0, d * 4);
    for (int64_t t = 0; t < h.tokens; t++)
        for (int64_t n = 0; n < h.queries + h.keys; n++) {
            const bool query = n < h.queries;
            place_backward(grad_x + t * h.row() + n * d, query ? grad_q_norm : grad_k_norm,
                           grad_turned + t * h.turned_row() + n * d, x + t * h.row() + n * d, query ? h.q_norm : h.k_norm,
                           h.rotation + t * d, rstd[t * (h.queries + h.keys) + n], query ? scale : 1.0f, d);
        }
}

// grad_x [tokens, row], grad_q_norm and grad_k_norm [d]: overwritten.
void miles_attention_backward(const Heads* given, const float* grad, const float* x, const float* turned, const float* rstd,
                              const float* log_sums, const float* out, float* grad_x, float* grad_q_norm, float* grad_k_norm) {
    const Heads& h = *given;
    const int64_t d = h.d, group = h.queries / h.keys, most = widest(h);
    Buffer grad_turned(h.tokens * h.turned_row()), keys_across(most * d), values_across(most * d);
    Buffer weights(most), grad_scores(most), grad_keys(most * d), grad_values(most * d);
    std::memset(grad_x, 0, h.tokens * h.row() * 4);
    for (int64_t m = 0; m < h.segments; m++) {
        const Visible seen(h, m);
        for (int64_t kv = 0; kv < h.keys; kv++) {
            const int64_t whole = padded(seen.count(), LANES);
            const float* keys = turned + (h.queries + kv) * d;
            lay_across(keys_across, keys, h.turned_row(), seen, whole, d);
            lay_across(values_across, x + (h.queries + h.keys + kv) * d, h.row(), seen, whole, d);
            std::memset(grad_keys, 0, seen.count() * d * 4);
            std::memset(grad_values, 0, seen.count() * d * 4);
            for (int64_t s = seen.before(); s < seen.count(); s++)
                for (int64_t n = kv * group; n < (kv + 1) * group; n++) {
                    const int64_t t = seen.row(s), visible = s + 1, width = padded(visible, LANES);
                    const float *query = turned + t * h.turned_row() + n * d, *above = grad + (t * h.queries + n) * d;
                    const float *result = out + (t * h.queries + n) * d, log_sum = log_sums[t * h.queries + n];
                    vec products = {};
                    for (int64_t i = 0; i < d; i += LANES) products = mul_add(load(above + i), load(result + i), products);
                    const float along = sum(products);
                    for (int64_t b = 0; b < width; b += LANES) {
                        vec score = {}, gain = {};
                        for (int64_t i = 0; i < d; i++) {
                            score = mul_add(query[i], load(keys_across + i * whole + b), score);
                            gain = mul_add(above[i], load(values_across + i * whole + b), gain);
                        }
                        const vec weight = exponential(score - log_sum);
                        store(weights + b, weight);
                        store(grad_scores + b, weight * (gain - along));
                    }
                    float* to_query = grad_turned + t * h.turned_row() + n * d;
                    for (int64_t b = 0; b < visible; b++) {
                        add_scaled(to_query, keys + seen.row(b) * h.turned_row(), grad_scores[b], d);
                        add_scaled(grad_keys + b * d, query, grad_scores[b], d);
                        add_scaled(grad_values + b * d, above, weights[b], d);
                    }
                }
            for (int64_t s = 0; s < seen.count(); s++) {
                const int64_t t = seen.row(s);
                add_scaled(grad_turned + t * h.turned_row() + (h.queries + kv) * d, grad_keys + s * d, 1.0f, d);
                add_scaled(grad_x + t * h.row() + (h.queries + h.keys + kv) * d, grad_values + s * d, 1.0f, d);
            }
        }
    }
    miles_heads_backward(given, grad_turned, x, rstd, grad_x, grad_q_norm, grad_k_norm);
}
}
