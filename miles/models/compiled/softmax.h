// Softmax of one row: of attention's scores, of a router's, of logits.
#pragma once

#include "vectors.h"

struct Softened {
    float highest, total;
};

// Numbers -> exp(number - largest), those from `count` on 0, and the sum. Whole vectors may be written.
inline Softened soften(float* numbers, int64_t count) {
    const int64_t whole = padded(count, LANES);
    for (int64_t s = count; s < whole; s++) numbers[s] = -INFINITY;
    vec top = load(numbers);
    for (int64_t s = LANES; s < whole; s += LANES) top = larger(top, load(numbers + s));
    const float highest = largest(top);
    vec total = {};
    for (int64_t s = 0; s < whole; s += LANES) {
        const vec weight = exponential(load(numbers + s) - highest);
        store(numbers + s, weight);
        total += weight;
    }
    return {highest, sum(total)};
}

// A router's logits -> probabilities of its experts.
inline void router_scores(float* logits, int64_t experts) {
    const float total = soften(logits, experts).total;
    for (int64_t e = 0; e < experts; e += LANES) store(logits + e, load(logits + e) / total);
}

// The k experts with the highest scores, best first, of equals the one with the smaller id. Spoils `scores`.
template <class Id>
inline void choose_experts(float* scores, int64_t experts, int64_t k, Id* ids) {
    for (int64_t j = 0; j < k; j++) {
        int64_t best = 0;
        for (int64_t e = 1; e < experts; e++)
            if (scores[e] > scores[best]) best = e;
        ids[j] = static_cast<Id>(best);
        scores[best] = -1.0f;
    }
}

// Scores of chosen experts -> what they are weighed with; added one after another.
inline void weigh_experts(float* chosen, int64_t k, bool normed) {
    if (!normed) return;
    float kept = chosen[0];
    for (int64_t j = 1; j < k; j++) kept += chosen[j];
    for (int64_t j = 0; j < k; j++) chosen[j] /= kept;
}

// What log-probs are made of: log p(i) = logits[i] - highest - log_total.
struct Masses {
    float highest, log_total;

    float log_prob(float logit) const { return logit - highest - log_total; }
};

// Divides `logits` by the temperature, in place and up to whole vectors; weights[i] = exp(logits[i] - highest). The
// sum of vocabularies is taken in double.
inline Masses weigh_logits(float* logits, float* weights, int64_t vocab, float temperature) {
    const int64_t whole = padded(vocab, LANES);
    if (temperature != 1.0f)
        for (int64_t i = 0; i < vocab; i++) logits[i] /= temperature;
    for (int64_t i = vocab; i < whole; i++) logits[i] = -INFINITY;
    vec top = load(logits);
    for (int64_t i = LANES; i < whole; i += LANES) top = larger(top, load(logits + i));
    const float highest = largest(top);
    double all = 0;
    for (int64_t i = 0; i < whole; i += LANES) {
        const vec weight = exponential(load(logits + i) - highest);
        store(weights + i, weight);
        all += sum(weight);
    }
    return {highest, static_cast<float>(std::log(all))};
}
