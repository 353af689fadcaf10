#include "model.h"

#include <algorithm>

#include "norms.h"

namespace {

constexpr int64_t SMALL_CHUNK = 256, LARGE_CHUNK = 1024;
constexpr int64_t LARGE_HIDDEN = 256;  // from here on a pass over the weights is dear: more rows share one

const float* take(float* to, const float* from, int64_t count) {
    std::memcpy(to, from, count * 4);
    return to;
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
        layer.qkv_bias.resize(qkv_stride_);
        layer.o_bias.resize(hidden_stride_);
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
    outputs_.resize(rows * hidden_stride_);
    inner_.resize(copies * inner_stride_);
    scores_.resize(4 * score_stride_);
    logits_.resize(rows * vocab_stride_);
    if (!most_experts) return;
    router_logits_.resize(rows * padded(most_experts, PANEL));
    chances_.resize(most_experts);
    gathered_.resize(copies * hidden_stride_);
    chosen_.resize(copies);
    gates_.resize(copies);
    sorted_.resize(copies);
    starts_.resize(most_experts + 1);
}

void Model::take_weights(const ModelWeights& weights, const LayerWeights* layers) {
    const int64_t hidden = sizes_.hidden, qkv_width = query_width_ + 2 * sizes_.key_heads * sizes_.head_dim;
    live_ = weights;
    pack(head_, weights.head, sizes_.vocab, hidden);
    for (int64_t i = 0; i < sizes_.layers; i++) {
        Layer& layer = layers_[i];
        const LayerWeights& live = layer.live = layers[i];
        const int64_t width = layer.sizes.intermediate;
        pack(layer.qkv, live.qkv, qkv_width, hidden);
        pack(layer.o, live.o, hidden, query_width_);
        if (live.qkv_bias) layer.live.qkv_bias = take(layer.qkv_bias, live.qkv_bias, qkv_width);
        if (live.o_bias) layer.live.o_bias = take(layer.o_bias, live.o_bias, hidden);
        if (layer.sizes.experts) pack(layer.router, live.router, layer.sizes.experts, hidden);
        for (size_t e = 0; e < layer.gate_up.size(); e++) {
            pack(layer.gate_up[e], live.gate_up + e * 2 * width * hidden, 2 * width, hidden, width);
            pack(layer.down[e], live.down + e * hidden * width, hidden, width);
        }
    }
}

void Model::pack(Matrix& matrix, const float* weights, int64_t outputs, int64_t inputs, int64_t half) {
    float* room = matrix.data ? matrix.data : arena_.take(Matrix::floats(outputs, inputs, half));
    matrix.pack(room, weights, outputs, inputs, half);
}

void Model::forward(const Rows& rows, int16_t* routes, const int64_t* route_rows) {
    const int64_t hidden = sizes_.hidden;
    for (int64_t r = 0; r < rows.count; r++)
        std::memcpy(hidden_ + r * hidden_stride_, live_.embed + rows.tokens[r] * hidden, hidden * 4);
    keep(0, hidden_, rows.count);
    int64_t moe_layer = 0;
    for (int64_t i = 0; i < sizes_.layers; i++) {
        Layer& layer = layers_[i];
        attention(layer, i, rows);
        keep(3 * i + 1, outputs_, rows.count);
        for (int64_t r = 0; r < rows.count; r++)
            rms_norm(normed_ + r * hidden_stride_, hidden_ + r * hidden_stride_, layer.live.post_norm, hidden, sizes_.eps);
        if (layer.sizes.experts)
            experts(layer, rows.count, routes, route_rows, moe_layer++);
        else
            dense(layer, rows.count);
        keep(3 * i + 2, outputs_, rows.count);
        keep(3 * i + 3, hidden_, rows.count);
    }
}

void Model::trace(const Rows& rows, float* states) {
    states_ = states;
    forward(rows, nullptr, nullptr);
    for (int64_t r = 0; r < rows.count; r++)
        rms_norm(normed_ + r * hidden_stride_, hidden_ + r * hidden_stride_, live_.final_norm, sizes_.hidden, sizes_.eps);
    keep(3 * sizes_.layers + 1, normed_, rows.count);
    states_ = nullptr;
}

void Model::keep(int64_t stage, const float* from, int64_t count) {
    if (!states_) return;
    for (int64_t r = 0; r < count; r++)
        std::memcpy(states_ + (r * stages() + stage) * sizes_.hidden, from + r * hidden_stride_, sizes_.hidden * 4);
}

void Model::attention(Layer& layer, int64_t index, const Rows& rows) {
    const int64_t d = sizes_.head_dim, width = cache_.value_width, group = sizes_.heads / sizes_.key_heads;
    for (int64_t r = 0; r < rows.count; r++)
        rms_norm(normed_ + r * hidden_stride_, hidden_ + r * hidden_stride_, layer.live.input_norm, sizes_.hidden, sizes_.eps);
    product_into(qkv_, qkv_stride_, normed_, hidden_stride_, rows.count, layer.qkv, layer.live.qkv_bias);
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
    add_product(attended_, query_width_, rows.count, layer.o, layer.live.o_bias);
}

// hidden += x @ matrix + bias; what is added goes to outputs_ too where it is traced.
void Model::add_product(const float* x, int64_t stride, int64_t rows, const Matrix& matrix, const float* bias) {
    product(x, stride, rows, matrix, [&](int64_t row, int64_t panel, vec left, vec right) {
        if (bias) left += load(bias + panel * PANEL), right += load(bias + panel * PANEL + LANES);
        const int64_t at = row * hidden_stride_ + panel * PANEL;
        if (states_) store(outputs_ + at, left), store(outputs_ + at + LANES, right);
        store(hidden_ + at, load(hidden_ + at) + left);
        store(hidden_ + at + LANES, load(hidden_ + at + LANES) + right);
    });
}

// Norms and rotates queries in place (scaled for the scores), and puts keys and values into the cache.
void Model::place_heads(const Layer& layer, int64_t index, const Rows& rows) {
    const int64_t d = sizes_.head_dim;
    const HeadOperation place_one = head_operation(d);
    const float scale = 1.0f / std::sqrt(static_cast<float>(d));
    float* key = wide_heads_;
    for (int64_t r = 0; r < rows.count; r++) {
        const float *cos = live_.cos + rows.positions[r] * (d / 2), *sin = live_.sin + rows.positions[r] * (d / 2);
        float* heads = qkv_ + r * qkv_stride_;
        for (int64_t h = 0; h < sizes_.heads; h++)
            place_one(heads + h * d, heads + h * d, layer.live.q_norm, cos, sin, sizes_.eps, scale, d);
        const float *keys = heads + query_width_, *values = keys + sizes_.key_heads * d;
        for (int64_t h = 0; h < sizes_.key_heads; h++) {
            place_one(key, keys + h * d, layer.live.k_norm, cos, sin, sizes_.eps, 1.0f, d);
            cache_.write(cache_.place(index, rows.slots[r], h), rows.positions[r], key, values + h * d);
        }
    }
}

void Model::dense(Layer& layer, int64_t count) {
    gated_product(normed_, count, layer.gate_up[0]);
    add_product(inner_, inner_stride_, count, layer.down[0], nullptr);
}

// inner = silu(x @ gate) * (x @ up) of a matrix packed with `half`.
void Model::gated_product(const float* x, int64_t rows, const Matrix& matrix) {
    product(x, hidden_stride_, rows, matrix, [&](int64_t row, int64_t panel, vec gate, vec up) {
        store(inner_ + row * inner_stride_ + panel * LANES, silu(gate) * up);
    });
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
    std::memset(outputs_, 0, count * hidden_stride_ * 4);
    for (int64_t e = 0; e < experts; e++) {
        const int64_t first = starts_[e], rows = starts_[e + 1] - first;
        if (!rows) continue;
        gated_product(gathered_ + first * hidden_stride_, rows, layer.gate_up[e]);
        product(inner_, inner_stride_, rows, layer.down[e], [&](int64_t row, int64_t panel, vec left, vec right) {
            const int64_t c = sorted_[first + row];
            float* at = outputs_ + c / k * hidden_stride_ + panel * PANEL;
            store(at, mul_add(gates_[c], left, load(at)));
            store(at + LANES, mul_add(gates_[c], right, load(at + LANES)));
        });
    }
    for (int64_t i = 0; i < count * hidden_stride_; i += LANES) store(hidden_ + i, load(hidden_ + i) + load(outputs_ + i));
}

// The top k of the softmax over experts, most probable first, and their weights.
void Model::route(Layer& layer, int64_t count, int16_t* routes, const int64_t* route_rows, int64_t moe_layer) {
    const int64_t experts = layer.sizes.experts, k = layer.sizes.top_k, stride = padded(experts, PANEL);
    product_into(router_logits_, stride, normed_, hidden_stride_, count, layer.router);
    for (int64_t r = 0; r < count; r++) {
        float *scores = router_logits_ + r * stride, *gates = gates_.data() + r * k;
        router_scores(scores, experts);
        std::memcpy(chances_, scores, experts * 4);
        int64_t* chosen = chosen_.data() + r * k;
        choose_experts(scores, experts, k, chosen);
        for (int64_t j = 0; j < k; j++) {
            gates[j] = chances_[chosen[j]];
            if (routes) routes[route_rows[r] * sizes_.moe_layers * k + moe_layer * k + j] = static_cast<int16_t>(chosen[j]);
        }
        weigh_experts(gates, k, layer.sizes.normed);
    }
}

float* Model::logits(const int64_t* rows, int64_t count) {
    for (int64_t i = 0; i < count; i++)
        rms_norm(normed_ + i * hidden_stride_, hidden_ + (rows ? rows[i] : i) * hidden_stride_, live_.final_norm, sizes_.hidden,
                 sizes_.eps);
    product_into(logits_, vocab_stride_, normed_, hidden_stride_, count, head_);
    return logits_;
}
