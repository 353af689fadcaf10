#include "model.h"

#include <algorithm>

namespace {

constexpr int64_t SMALL_CHUNK = 256, LARGE_CHUNK = 1024;
constexpr int64_t LARGE_HIDDEN = 256;  // from here on a pass over the weights is dear: more rows share one

void rms_norm(float* out, const float* x, const float* weight, int64_t width, float eps) {
    vec squares = {};
    const int64_t whole = width / LANES * LANES;
    for (int64_t i = 0; i < whole; i += LANES) squares += load(x + i) * load(x + i);
    float total = sum(squares);
    for (int64_t i = whole; i < width; i++) total += x[i] * x[i];
    const float scale = 1.0f / std::sqrt(total / width + eps);
    for (int64_t i = 0; i < whole; i += LANES) store(out + i, load(x + i) * scale * load(weight + i));
    for (int64_t i = whole; i < width; i++) out[i] = x[i] * scale * weight[i];
}

// Head norm where the model has weights for it, then rotation of dimensions i and i + d/2 together; times `scale`.
// DIM 0: any width.
template <int64_t DIM>
void norm_and_rotate(float* out, const float* x, const float* weight, const float* cos, const float* sin, float eps,
                     float scale, int64_t dim) {
    const int64_t d = DIM ? DIM : dim, half = d / 2;
    if (!weight) {
#pragma omp simd
        for (int64_t i = 0; i < half; i++) {
            const float a = x[i] * scale, b = x[i + half] * scale;
            out[i] = a * cos[i] - b * sin[i];
            out[i + half] = b * cos[i] + a * sin[i];
        }
        return;
    }
    float total = 0;
#pragma omp simd reduction(+ : total)
    for (int64_t i = 0; i < d; i++) total += x[i] * x[i];
    const float factor = scale / std::sqrt(total / d + eps);
#pragma omp simd
    for (int64_t i = 0; i < half; i++) {
        const float a = x[i] * factor * weight[i], b = x[i + half] * factor * weight[i + half];
        out[i] = a * cos[i] - b * sin[i];
        out[i + half] = b * cos[i] + a * sin[i];
    }
}

using HeadOperation = void (*)(float*, const float*, const float*, const float*, const float*, float, float, int64_t);

HeadOperation head_operation(int64_t dim) {
    switch (dim) {
        case 16: return norm_and_rotate<16>;
        case 32: return norm_and_rotate<32>;
        case 64: return norm_and_rotate<64>;
        case 128: return norm_and_rotate<128>;
        default: return norm_and_rotate<0>;
    }
}

void add_bias(float* x, int64_t stride, int64_t rows, const float* bias, int64_t width) {
    if (!bias) return;
    for (int64_t r = 0; r < rows; r++)
        for (int64_t i = 0; i < width; i++) x[r * stride + i] += bias[i];
}

}  // namespace

Model::Model(const Sizes& sizes, const LayerSizes* layers, float* keys, float* values) : sizes_(sizes), layers_(sizes.layers) {
    const int64_t d = sizes.head_dim, width = padded(d, LANES);
    cache_ = {keys, values, sizes.slots, sizes.key_heads, sizes.blocks, d, width};
    chunk_ = sizes.hidden < LARGE_HIDDEN ? SMALL_CHUNK : LARGE_CHUNK;
    hidden_stride_ = padded(sizes.hidden, PANEL);
    qkv_stride_ = padded((sizes.heads + 2 * sizes.key_heads) * d, PANEL);
    query_width_ = sizes.heads * d;
    vocab_stride_ = padded(sizes.vocab, PANEL);
    score_stride_ = sizes.blocks * LANES;
    int64_t widest = 0, most_experts = 0, most_chosen = 1;
    for (int64_t i = 0; i < sizes.layers; i++) {
        Layer& layer = layers_[i];
        layer.sizes = layers[i];
        layer.gate_up.resize(std::max<int64_t>(1, layers[i].experts));
        layer.down.resize(layer.gate_up.size());
        widest = std::max(widest, layers[i].intermediate);
        most_experts = std::max(most_experts, layers[i].experts);
        most_chosen = std::max(most_chosen, layers[i].top_k);
    }
    inner_stride_ = padded(widest, LANES);
    const int64_t rows = chunk_, copies = chunk_ * most_chosen;
    hidden_.resize(rows * hidden_stride_);
    normed_.resize(rows * hidden_stride_);
    qkv_.resize(rows * qkv_stride_);
    wide_heads_.resize(sizes.heads * width);
    attended_.resize(rows * query_width_);
    inner_.resize(copies * inner_stride_);
    scores_.resize(4 * score_stride_);
    logits_.resize(rows * vocab_stride_);
    if (!most_experts) return;
    router_logits_.resize(rows * padded(most_experts, PANEL));
    gathered_.resize(copies * hidden_stride_);
    chosen_.resize(copies);
    gates_.resize(copies);
    sorted_.resize(copies);
    starts_.resize(most_experts + 1);
}

void Model::take_weights(const ModelWeights& weights, const LayerWeights* layers) {
    const int64_t hidden = sizes_.hidden;
    live_ = weights;
    head_.pack(arena_, weights.head, sizes_.vocab, hidden);
    for (int64_t i = 0; i < sizes_.layers; i++) {
        Layer& layer = layers_[i];
        const LayerWeights& live = layer.live = layers[i];
        const int64_t width = layer.sizes.intermediate;
        layer.qkv.pack(arena_, live.qkv, query_width_ + 2 * sizes_.key_heads * sizes_.head_dim, hidden);
        layer.o.pack(arena_, live.o, hidden, query_width_);
        if (layer.sizes.experts) layer.router.pack(arena_, live.router, layer.sizes.experts, hidden);
        for (size_t e = 0; e < layer.gate_up.size(); e++) {
            layer.gate_up[e].pack(arena_, live.gate_up + e * 2 * width * hidden, 2 * width, hidden, width);
            layer.down[e].pack(arena_, live.down + e * hidden * width, hidden, width);
        }
    }
}

void Model::forward(const Rows& rows, int16_t* routes, const int64_t* route_rows) {
    const int64_t hidden = sizes_.hidden;
    for (int64_t r = 0; r < rows.count; r++)
        std::memcpy(hidden_ + r * hidden_stride_, live_.embed + rows.tokens[r] * hidden, hidden * 4);
    int64_t moe_layer = 0;
    for (int64_t i = 0; i < sizes_.layers; i++) {
        Layer& layer = layers_[i];
        attention(layer, i, rows);
        for (int64_t r = 0; r < rows.count; r++)
            rms_norm(normed_ + r * hidden_stride_, hidden_ + r * hidden_stride_, layer.live.post_norm, hidden, sizes_.eps);
        if (layer.sizes.experts)
            experts(layer, rows.count, routes, route_rows, moe_layer++);
        else
            dense(layer, rows.count);
    }
}

void Model::attention(Layer& layer, int64_t index, const Rows& rows) {
    const int64_t d = sizes_.head_dim, width = cache_.value_width, group = sizes_.heads / sizes_.key_heads;
    for (int64_t r = 0; r < rows.count; r++)
        rms_norm(normed_ + r * hidden_stride_, hidden_ + r * hidden_stride_, layer.live.input_norm, sizes_.hidden, sizes_.eps);
    product_into(qkv_, qkv_stride_, normed_, hidden_stride_, rows.count, layer.qkv);
    add_bias(qkv_, qkv_stride_, rows.count, layer.live.qkv_bias, query_width_ + 2 * sizes_.key_heads * d);
    place_heads(layer, index, rows);
    for (int64_t r = 0; r < rows.count; r++) {
        const int64_t count = rows.positions[r] + 1;
        for (int64_t head = 0; head < sizes_.key_heads; head++) {
            const int64_t place = cache_.place(index, rows.slots[r], head);
            const float* queries = qkv_ + r * qkv_stride_ + head * group * d;
            float* out = attended_ + r * query_width_ + head * group * d;
            if (width == d) {
                attend(cache_, place, queries, d, group, count, scores_, score_stride_, out, d);
                continue;
            }
            attend(cache_, place, queries, d, group, count, scores_, score_stride_, wide_heads_, width);
            for (int64_t g = 0; g < group; g++) std::memcpy(out + g * d, wide_heads_ + g * width, d * 4);
        }
    }
    product_added(hidden_, hidden_stride_, attended_, query_width_, rows.count, layer.o);
    add_bias(hidden_, hidden_stride_, rows.count, layer.live.o_bias, sizes_.hidden);
}

// Norms and rotates queries in place (scaled for the scores), and puts keys and values into the cache.
void Model::place_heads(const Layer& layer, int64_t index, const Rows& rows) {
    const int64_t d = sizes_.head_dim;
    const HeadOperation place_head = head_operation(d);
    const float scale = 1.0f / std::sqrt(static_cast<float>(d));
    float* key = wide_heads_;
    for (int64_t r = 0; r < rows.count; r++) {
        const float *cos = live_.cos + rows.positions[r] * (d / 2), *sin = live_.sin + rows.positions[r] * (d / 2);
        float* heads = qkv_ + r * qkv_stride_;
        for (int64_t h = 0; h < sizes_.heads; h++)
            place_head(heads + h * d, heads + h * d, layer.live.q_norm, cos, sin, sizes_.eps, scale, d);
        const float *keys = heads + query_width_, *values = keys + sizes_.key_heads * d;
        for (int64_t h = 0; h < sizes_.key_heads; h++) {
            place_head(key, keys + h * d, layer.live.k_norm, cos, sin, sizes_.eps, 1.0f, d);
            cache_.write(cache_.place(index, rows.slots[r], h), rows.positions[r], key, values + h * d);
        }
    }
}

void Model::dense(Layer& layer, int64_t count) {
    gated_product(inner_, inner_stride_, normed_, hidden_stride_, count, layer.gate_up[0]);
    product_added(hidden_, hidden_stride_, inner_, inner_stride_, count, layer.down[0]);
}

// Rows sorted by expert; a row's experts are added in the order of their ids.
void Model::experts(Layer& layer, int64_t count, int16_t* routes, const int64_t* route_rows, int64_t moe_layer) {
    const int64_t experts = layer.sizes.experts, k = layer.sizes.top_k;
    route(layer, count, routes, route_rows, moe_layer);
    std::fill(starts_.begin(), starts_.begin() + experts + 1, 0);
    for (int64_t c = 0; c < count * k; c++) starts_[chosen_[c] + 1]++;
    for (int64_t e = 0; e < experts; e++) starts_[e + 1] += starts_[e];
    next_.assign(starts_.begin(), starts_.begin() + experts);
    for (int64_t c = 0; c < count * k; c++) {
        const int64_t at = next_[chosen_[c]]++;
        sorted_[at] = c;
        std::memcpy(gathered_ + at * hidden_stride_, normed_ + c / k * hidden_stride_, sizes_.hidden * 4);
    }
    for (int64_t e = 0; e < experts; e++) {
        const int64_t first = starts_[e], rows = starts_[e + 1] - first;
        if (!rows) continue;
        gated_product(inner_, inner_stride_, gathered_ + first * hidden_stride_, hidden_stride_, rows, layer.gate_up[e]);
        product(inner_, inner_stride_, rows, layer.down[e], [&](int64_t row, int64_t panel, vec left, vec right) {
            const int64_t c = sorted_[first + row];
            float* at = hidden_ + c / k * hidden_stride_ + panel * PANEL;
            store(at, load(at) + gates_[c] * left);
            store(at + LANES, load(at + LANES) + gates_[c] * right);
        });
    }
}

// The top k of the softmax over experts, most probable first, and their weights.
void Model::route(Layer& layer, int64_t count, int16_t* routes, const int64_t* route_rows, int64_t moe_layer) {
    const int64_t experts = layer.sizes.experts, k = layer.sizes.top_k, stride = padded(experts, PANEL);
    product_into(router_logits_, stride, normed_, hidden_stride_, count, layer.router);
    for (int64_t r = 0; r < count; r++) {
        float* scores = router_logits_ + r * stride;
        const float total = 1.0f / soften(scores, experts);
        float kept = 0;
        for (int64_t j = 0; j < k; j++) {
            int64_t best = 0;
            for (int64_t e = 1; e < experts; e++)
                if (scores[e] > scores[best]) best = e;
            chosen_[r * k + j] = best;
            gates_[r * k + j] = scores[best];
            kept += scores[best];
            scores[best] = -1.0f;
            if (routes) routes[route_rows[r] * sizes_.moe_layers * k + moe_layer * k + j] = static_cast<int16_t>(best);
        }
        const float divisor = layer.sizes.normed ? kept : total;
        for (int64_t j = 0; j < k; j++) gates_[r * k + j] /= divisor;
    }
}

float* Model::logits(const int64_t* rows, int64_t count) {
    for (int64_t i = 0; i < count; i++)
        rms_norm(normed_ + i * hidden_stride_, hidden_ + (rows ? rows[i] : i) * hidden_stride_, live_.final_norm, sizes_.hidden,
                 sizes_.eps);
    product_into(logits_, vocab_stride_, normed_, hidden_stride_, count, head_);
    return logits_;
}
