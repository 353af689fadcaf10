// What Python calls: see kernel.py, which mirrors the structures.

#include <algorithm>
#include <chrono>
#include <numeric>

#include "model.h"
#include "sampling.h"

namespace {
using Clock = std::chrono::steady_clock;
}

extern "C" {

// The slots of slots.py: n requests run in slots 0..n-1.
struct Requests {
    int64_t *lengths, *limits, *last_tokens, *stream, *min_length, *stop_ids;
    float* temperature;
    uint8_t* greedy;
    int64_t* tokens;
    float* log_probs;
    int16_t* routes;
    int64_t context_length, num_stop;
};

int64_t miles_lanes() { return LANES; }

void* miles_create(const Sizes* sizes, const LayerSizes* layers, float* keys, float* values) {
    return new Model(*sizes, layers, keys, values);
}

void miles_destroy(void* model) { delete static_cast<Model*>(model); }

void miles_load(void* model, const ModelWeights* weights, const LayerWeights* layers) {
    static_cast<Model*>(model)->take_weights(*weights, layers);
}

// Copies the first `used` floats of every layer and head of slots, in order, in a cache [layers, slots, heads, width].
void miles_copy_slots(float* cache, int64_t layers, int64_t slots, int64_t heads, int64_t width, int64_t used,
                      const int64_t* sources, const int64_t* destinations, int64_t count) {
    for (int64_t layer = 0; layer < layers; layer++)
        for (int64_t i = 0; i < count; i++) {
            const float* from = cache + (layer * slots + sources[i]) * heads * width;
            float* to = cache + (layer * slots + destinations[i]) * heads * width;
            for (int64_t head = 0; head < heads; head++) std::memcpy(to + head * width, from + head * width, used * 4);
        }
}

// Reads `count` rows. wanted[r]: the line of `logits` [lines, vocab] for what follows row r, -1 for none.
void miles_read(void* handle, const int64_t* tokens, const int64_t* slots, const int64_t* positions, int64_t count,
                const int64_t* wanted, float* logits, int16_t* routes) {
    Model& model = *static_cast<Model*>(handle);
    std::vector<int64_t> row_of_chunk(model.most_rows()), route_rows(model.most_rows());
    for (int64_t first = 0; first < count; first += model.most_rows()) {
        const int64_t size = std::min(model.most_rows(), count - first);
        for (int64_t r = 0; r < size; r++) route_rows[r] = first + r;
        model.forward({tokens + first, slots + first, positions + first, size}, routes, route_rows.data());
        int64_t ends = 0;
        for (int64_t r = 0; r < size; r++)
            if (wanted[first + r] >= 0) row_of_chunk[ends++] = r;
        const float* found = model.logits(row_of_chunk.data(), ends);
        for (int64_t e = 0; e < ends; e++)
            std::memcpy(logits + wanted[first + row_of_chunk[e]] * model.sizes().vocab, found + e * model.logit_stride(),
                        model.sizes().vocab * 4);
    }
}

int64_t miles_stages(void* handle) { return static_cast<Model*>(handle)->stages(); }

// Reads `count` rows, at most as many as the kernel reads at once, and keeps their states, see Model::trace.
void miles_trace(void* handle, const int64_t* tokens, const int64_t* slots, const int64_t* positions, int64_t count,
                 float* states) {
    static_cast<Model*>(handle)->trace({tokens, slots, positions, count}, states);
}

// Decodes up to `most_steps` tokens for every request that is not done. Stops after `seconds`, and after the step in
// which the first of them is done, or with `to_the_end` the last. done[slot] (0 before) says which are; returns the
// steps, or -1 - slot for a log-prob that is not finite.
int64_t miles_decode(void* handle, const Requests* requests, int64_t n, int64_t most_steps, double seconds,
                     int64_t to_the_end, uint8_t* done) {
    Model& model = *static_cast<Model*>(handle);
    const Requests& all = *requests;
    const int64_t most = std::min(n, model.most_rows());
    std::vector<int64_t> left(n), tokens(most), positions(most), route_rows(most);
    std::iota(left.begin(), left.end(), 0);
    Buffer weights(model.logit_stride());
    const auto begin = Clock::now();
    for (int64_t step = 1;; step++) {
        const int64_t running = left.size();
        for (int64_t first = 0; first < running; first += most) {
            const int64_t size = std::min(most, running - first);
            const int64_t* slots = left.data() + first;
            for (int64_t r = 0; r < size; r++) {
                tokens[r] = all.last_tokens[slots[r]];
                positions[r] = all.lengths[slots[r]] - 1;
                route_rows[r] = slots[r] * all.context_length + positions[r];
            }
            model.forward({tokens.data(), slots, positions.data(), size}, all.routes, route_rows.data());
            float* logits = model.logits(nullptr, size);
            for (int64_t r = 0; r < size; r++) {
                const int64_t slot = slots[r], length = all.lengths[slot];
                const int64_t* stops = all.stop_ids + slot * all.num_stop;
                const Manner manner{all.temperature[slot], all.greedy[slot] != 0, length < all.min_length[slot],
                                    all.stream[slot], stops, all.num_stop};
                const Choice choice =
                    choose(logits + r * model.logit_stride(), weights, model.sizes().vocab, manner, length);
                if (!std::isfinite(choice.log_prob)) return -1 - slot;
                all.tokens[slot * all.context_length + length] = all.last_tokens[slot] = choice.id;
                all.log_probs[slot * all.context_length + length] = choice.log_prob;
                done[slot] = ++all.lengths[slot] >= all.limits[slot];
                for (int64_t s = 0; s < all.num_stop; s++) done[slot] |= stops[s] == choice.id;
            }
        }
        left.erase(std::remove_if(left.begin(), left.end(), [&](int64_t slot) { return done[slot]; }), left.end());
        const bool one_done = static_cast<int64_t>(left.size()) < running;
        if (left.empty() || (one_done && !to_the_end) || step == most_steps) return step;
        if (std::chrono::duration<double>(Clock::now() - begin).count() > seconds) return step;
    }
}
}
