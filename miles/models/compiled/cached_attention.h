// Keys and values of every layer, slot and position, and one query row's attention over them.
//
// Keys lie in blocks of LANES positions: [layers, slots, key heads, blocks, d, LANES], so that one dimension of
// many keys is one vector. Values: [layers, slots, key heads, blocks * LANES, width], width d in whole vectors.
#pragma once

#include "softmax.h"

struct Cache {
    float *keys, *values;
    int64_t slots, key_heads, blocks, head_dim, value_width;

    int64_t place(int64_t layer, int64_t slot, int64_t head) const {
        return (layer * slots + slot) * key_heads + head;
    }
    float* keys_of(int64_t place) const { return keys + place * blocks * head_dim * LANES; }
    float* values_of(int64_t place) const { return values + place * blocks * LANES * value_width; }

    void write(int64_t place, int64_t position, const float* key, const float* value) const {
        float* at = keys_of(place) + position / LANES * head_dim * LANES + position % LANES;
        for (int64_t i = 0; i < head_dim; i++) at[i * LANES] = key[i];
        std::memcpy(values_of(place) + position * value_width, value, head_dim * 4);
    }
};

// scores[g][s] = queries[g] . keys[s] for QUERIES queries and two blocks of keys at a time.
template <int QUERIES>
inline void dot_keys(const float* queries, int64_t query_stride, const float* keys, int64_t blocks, int64_t dim,
                     float* scores, int64_t score_stride) {
    for (int64_t block = 0; block < blocks; block += 2) {
        const float* first = keys + block * dim * LANES;
        const float* second = block + 1 < blocks ? first + dim * LANES : first;
        vec one[QUERIES], other[QUERIES];
        for (int g = 0; g < QUERIES; g++) one[g] = other[g] = vec{};
        for (int64_t i = 0; i < dim; i++) {
            const vec a = load(first + i * LANES), b = load(second + i * LANES);
            for (int g = 0; g < QUERIES; g++) {
                const vec q = spread(queries[g * query_stride + i]);
                one[g] = mul_add(q, a, one[g]);
                other[g] = mul_add(q, b, other[g]);
            }
        }
        for (int g = 0; g < QUERIES; g++) {
            store(scores + g * score_stride + block * LANES, one[g]);
            if (block + 1 < blocks) store(scores + g * score_stride + (block + 1) * LANES, other[g]);
        }
    }
}

// out[g] = scale[g] * sum_s weights[g][s] values[s], VECTORS vectors of it, even and odd positions apart.
template <int QUERIES, int VECTORS>
inline void weigh_values(const float* weights, int64_t weight_stride, const float* values, int64_t value_width,
                         int64_t count, const float* scale, float* out, int64_t out_stride) {
    vec even[QUERIES][VECTORS], odd[QUERIES][VECTORS];
    for (int g = 0; g < QUERIES; g++)
        for (int v = 0; v < VECTORS; v++) even[g][v] = odd[g][v] = vec{};
    int64_t s = 0;
    for (; s + 2 <= count; s += 2)
        for (int v = 0; v < VECTORS; v++) {
            const vec a = load(values + s * value_width + v * LANES);
            const vec b = load(values + (s + 1) * value_width + v * LANES);
            for (int g = 0; g < QUERIES; g++) {
                even[g][v] = mul_add(weights[g * weight_stride + s], a, even[g][v]);
                odd[g][v] = mul_add(weights[g * weight_stride + s + 1], b, odd[g][v]);
            }
        }
    if (s < count)
        for (int v = 0; v < VECTORS; v++) {
            const vec a = load(values + s * value_width + v * LANES);
            for (int g = 0; g < QUERIES; g++) even[g][v] = mul_add(weights[g * weight_stride + s], a, even[g][v]);
        }
    for (int g = 0; g < QUERIES; g++)
        for (int v = 0; v < VECTORS; v++) store(out + g * out_stride + v * LANES, scale[g] * (even[g][v] + odd[g][v]));
}

template <int QUERIES>
inline void attend_group(const Cache& cache, int64_t place, const float* queries, int64_t stride, int64_t count,
                         float* scores, int64_t score_stride, float* out, int64_t out_stride, float* log_sums) {
    float scale[QUERIES];
    dot_keys<QUERIES>(queries, stride, cache.keys_of(place), padded(count, LANES) / LANES, cache.head_dim, scores,
                      score_stride);
    for (int g = 0; g < QUERIES; g++) {
        const Softened found = soften(scores + g * score_stride, count);
        scale[g] = 1.0f / found.total;
        if (log_sums) log_sums[g] = found.highest + std::log(found.total);
    }
    const float* values = cache.values_of(place);
    int64_t done = 0;
    for (; done + 2 * LANES <= cache.value_width; done += 2 * LANES)
        weigh_values<QUERIES, 2>(scores, score_stride, values + done, cache.value_width, count, scale, out + done,
                                    out_stride);
    for (; done < cache.value_width; done += LANES)
        weigh_values<QUERIES, 1>(scores, score_stride, values + done, cache.value_width, count, scale, out + done,
                                    out_stride);
}

// Attention of the `group` scaled queries that share one key head over positions 0..count-1. Results have whole
// vectors. scores: room for 4 rows of score_stride. log_sums [group], for a backward: the logs of the sums of
// exponential scores.
inline void attend(const Cache& cache, int64_t place, const float* queries, int64_t stride, int64_t group,
                   int64_t count, float* scores, int64_t score_stride, float* out, int64_t out_stride,
                   float* log_sums = nullptr) {
    int64_t g = 0;
    auto next = [&](auto attend_some, int64_t size) {
        for (; g + size <= group; g += size)
            attend_some(cache, place, queries + g * stride, stride, count, scores, score_stride, out + g * out_stride,
                        out_stride, log_sums ? log_sums + g : nullptr);
    };
    next(attend_group<4>, 4);
    next(attend_group<2>, 2);
    next(attend_group<1>, 1);
}
