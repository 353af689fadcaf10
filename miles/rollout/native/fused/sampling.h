// One token per row from its logits: temperature or greedy, minimum length. The draw is that of
// keyed_random.py: a number of the row's stream at its position, looked up in the cumulative weights.
#pragma once

#include "softmax.h"

struct Choice {
    int64_t id;
    float log_prob;  // over the whole vocabulary at the row's temperature
};

inline uint64_t mix(uint64_t x) {
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ull;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBull;
    return x ^ (x >> 31);
}

inline double uniform(int64_t stream, int64_t position) {
    const uint64_t word = mix(static_cast<uint64_t>(stream) + (position + 1) * 0x9E3779B97F4A7C15ull);
    return (static_cast<double>(word >> 12) + 0.5) * 0x1p-52;
}

inline double wide_sum(const float* weights) {
    double total = 0;
    for (int64_t i = 0; i < LANES; i++) total += weights[i];
    return total;
}

// A request's way of choosing. `stops`: ids that are not drawn while `too_short`, -1 is nobody.
struct Manner {
    float temperature;
    bool greedy, too_short;
    int64_t stream;
    const int64_t* stops;
    int64_t num_stops;

    bool bans(int64_t id) const {
        if (too_short)
            for (int64_t s = 0; s < num_stops; s++)
                if (stops[s] == id) return true;
        return false;
    }
};

// The first id whose cumulative weight exceeds u times the whole; sums in double, block after block.
inline int64_t draw(const float* weights, int64_t whole, double u) {
    double mass = 0, below = 0;
    for (int64_t i = 0; i < whole; i += LANES) mass += wide_sum(weights + i);
    const double target = u * mass;
    int64_t id = 0;
    for (int64_t i = 0; i < whole; i += LANES) {
        const double block = wide_sum(weights + i);
        if (below + block <= target && i + LANES < whole) {
            below += block;
            continue;
        }
        // Rounding may leave the target at the last sum: the last id with weight is meant.
        for (int64_t lane = 0; lane < LANES && below <= target; lane++) {
            if (weights[i + lane] > 0) id = i + lane;
            below += weights[i + lane];
        }
        break;
    }
    return id;
}

// The token at `position`. `logits` has whole vectors and is scaled in place; `weights` is scratch of its size.
inline Choice choose(float* logits, float* weights, int64_t vocab, const Manner& manner, int64_t position) {
    const int64_t whole = padded(vocab, LANES);
    const Masses masses = weigh_logits(logits, weights, vocab, manner.temperature);
    int64_t id = 0;
    if (manner.greedy) {
        float best = -INFINITY;
        for (int64_t i = 0; i < vocab; i++)
            if (logits[i] > best && !manner.bans(i)) best = logits[i], id = i;
    } else {
        if (manner.too_short)
            for (int64_t s = 0; s < manner.num_stops; s++)
                if (manner.stops[s] >= 0) weights[manner.stops[s]] = 0;
        id = draw(weights, whole, uniform(manner.stream, position));
    }
    return {id, masses.log_prob(logits[id])};
}
