// A decoder: its sizes, its packed weights, and the forward pass over rows.
//
// A row is one token: its id, its slot in the cache and its position there. Prefill and decode differ in their
// rows only: a row attends to what its slot holds up to its own position.
#pragma once

#include <vector>

#include "cached_attention.h"
#include "products.h"

extern "C" {
struct Sizes {
    int64_t vocab, hidden, layers, heads, key_heads, head_dim, slots, blocks, moe_layers, top_k;
    float eps;
};
struct LayerSizes {
    int64_t experts, top_k, intermediate, normed;  // experts 0: a dense layer
};
struct LayerWeights {  // fp32, as models/decoder.py holds them; absent ones are null
    const float *input_norm, *qkv, *qkv_bias, *q_norm, *k_norm, *o, *o_bias, *post_norm, *router, *gate_up, *down;
};
struct ModelWeights {
    const float *embed, *final_norm, *head, *cos, *sin;  // cos, sin: [positions, d / 2]
};
}

struct Layer {
    LayerSizes sizes;
    LayerWeights live;
    Matrix qkv, o, router;
    Buffer qkv_bias, o_bias;  // up to whole panels
    std::vector<Matrix> gate_up, down;
};

struct Rows {
    const int64_t *tokens, *slots, *positions;
    int64_t count;
};

class Model {
  public:
    Model(const Sizes& sizes, const LayerSizes* layers, float* keys, float* values);
    void take_weights(const ModelWeights& weights, const LayerWeights* layers);
    // Reads at most `most_rows()` rows. Route of row r, layer l, slot j: routes[route_rows[r] * stride + l * k + j].
    void forward(const Rows& rows, int16_t* routes, const int64_t* route_rows);
    // Logits after these rows of the last forward (null: the first `count`); overwritten by the next call.
    float* logits(const int64_t* rows, int64_t count);
    // Reads as `forward` does, and keeps states [rows, stages, hidden]: the embedding; of every layer what attention and
    // experts (or the dense block) add to the sum, and the sum; the final norm.
    void trace(const Rows& rows, float* states);
    int64_t stages() const { return 3 * sizes_.layers + 2; }
    int64_t most_rows() const { return chunk_; }
    int64_t logit_stride() const { return vocab_stride_; }
    const Sizes& sizes() const { return sizes_; }

  private:
    void pack(Matrix& matrix, const float* weights, int64_t outputs, int64_t inputs, int64_t half = 0);
    void keep(int64_t stage, const float* from, int64_t count);
    void attention(Layer& layer, int64_t index, const Rows& rows);
    void place_heads(const Layer& layer, int64_t index, const Rows& rows);
    void add_product(const float* x, int64_t stride, int64_t rows, const Matrix& matrix, const float* bias);
    void gated_product(const float* x, int64_t rows, const Matrix& matrix);
    void dense(Layer& layer, int64_t count);
    void experts(Layer& layer, int64_t count, int16_t* routes, const int64_t* route_rows, int64_t moe_layer);
    void route(Layer& layer, int64_t count, int16_t* routes, const int64_t* route_rows, int64_t moe_layer);

    Sizes sizes_;
    ModelWeights live_{};
    Arena arena_;
    Cache cache_;
    std::vector<Layer> layers_;
    Matrix head_;
    int64_t chunk_, hidden_stride_, qkv_stride_, query_width_, inner_stride_, vocab_stride_, score_stride_;
    Buffer hidden_, normed_, qkv_, wide_heads_, attended_, outputs_, inner_, router_logits_, chances_;
    Buffer gathered_, scores_, logits_;
    float* states_ = nullptr;
    std::vector<int64_t> chosen_, starts_, next_, sorted_;
    std::vector<float> gates_;
};
