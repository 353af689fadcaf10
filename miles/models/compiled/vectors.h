// Vectors of the widest registers this machine has, in the compiler's portable notation.
//
// Two functions that are to give the same bits call the same code of these headers. What is rounded where must then
// not be left to the compiler, which may join a product and a sum in one place and not in another: sources are
// compiled with -ffp-contract=off, and say `mul_add` where one rounding is meant. Sums have an order of their own.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <utility>
#include <vector>

#ifdef __linux__
#include <sys/mman.h>
#endif

#if defined(__FMA__) || defined(__AVX512F__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#if defined(__AVX512F__)
#define VECTOR_BYTES 64
#define TILE_ROWS 12
#elif defined(__AVX__)
#define VECTOR_BYTES 32
#define TILE_ROWS 6
#else
#define VECTOR_BYTES 16
#define TILE_ROWS 8
#endif

typedef float vec __attribute__((vector_size(VECTOR_BYTES), aligned(4), may_alias));
typedef int32_t ivec __attribute__((vector_size(VECTOR_BYTES), aligned(4), may_alias));

constexpr int64_t LANES = VECTOR_BYTES / 4;

inline int64_t padded(int64_t count, int64_t step) { return (count + step - 1) / step * step; }
inline vec load(const float* at) { return *reinterpret_cast<const vec*>(at); }
inline void store(float* at, vec x) { *reinterpret_cast<vec*>(at) = x; }
inline vec spread(float x) { return x - vec{}; }
inline ivec spread(int32_t x) { return x - ivec{}; }
inline vec larger(vec a, vec b) { return a > b ? a : b; }

// a * b + c, rounded once where the machine has such an instruction, else twice.
#if defined(__AVX512F__)
inline vec mul_add(vec a, vec b, vec c) { return (vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
#elif defined(__FMA__)
inline vec mul_add(vec a, vec b, vec c) { return (vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
#elif defined(__ARM_NEON)
inline vec mul_add(vec a, vec b, vec c) {
    return (vec)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
}
#else
inline vec mul_add(vec a, vec b, vec c) { return a * b + c; }
#endif
inline vec mul_add(float a, vec b, vec c) { return mul_add(spread(a), b, c); }

// The vector turned by SHIFT lanes.
#if defined(__has_builtin) && __has_builtin(__builtin_shufflevector)
template <int SHIFT, size_t... LANE>
inline vec turned(vec x, std::index_sequence<LANE...>) {
    return __builtin_shufflevector(x, x, static_cast<int>((LANE + SHIFT) % LANES)...);
}
#else
template <int SHIFT, size_t... LANE>
inline vec turned(vec x, std::index_sequence<LANE...>) {
    return vec{x[(LANE + SHIFT) % LANES]...};
}
#endif

template <int SHIFT = LANES / 2, class Operation>
inline float reduced(vec x, Operation operation) {
    x = operation(x, turned<SHIFT>(x, std::make_index_sequence<LANES>()));
    if constexpr (SHIFT > 1)
        return reduced<SHIFT / 2>(x, operation);
    else
        return x[0];
}

inline float sum(vec x) {
    return reduced(x, [](vec a, vec b) { return a + b; });
}
inline float largest(vec x) { return reduced(x, larger); }

// e^x for x <= 88 within 2 units of the last place; 0 below -87. NaN stays NaN. The polynomial is that of
// Cephes' expf (Moshier): e^x = 2^n e^r with |r| <= ln(2) / 2.
inline vec exponential(vec x) {
    const vec magic = spread(12582912.0f);  // 1.5 * 2^23: adding it rounds to a whole number
    const vec low = spread(-87.0f), high = spread(88.0f);
    const vec inside = x < low ? low : (x > high ? high : x);
    const vec shifted = mul_add(inside, spread(1.44269504088896341f), magic);
    const vec n = shifted - magic;
    const vec r = mul_add(2.12194440e-4f, n, mul_add(-0.693359375f, n, inside));
    vec p = spread(1.9875691500e-4f);
    p = mul_add(p, r, spread(1.3981999507e-3f));
    p = mul_add(p, r, spread(8.3334519073e-3f));
    p = mul_add(p, r, spread(4.1665795894e-2f));
    p = mul_add(p, r, spread(1.6666665459e-1f));
    p = mul_add(p, r, spread(5.0000001201e-1f));
    p = mul_add(p * r, r, r) + 1.0f;
    const ivec power = (((ivec)shifted - (ivec)magic) + 127) << 23;
    const vec result = p * (vec)power;
    return x < low ? vec{} : result;
}

inline vec silu(vec x) { return x / (1.0f + exponential(-x)); }

struct Free {
    void operator()(float* data) const { std::free(data); }
};
using Floats = std::unique_ptr<float[], Free>;

constexpr int64_t HUGE_PAGE = 1 << 21;

// At least `count` floats on a cache line. Large blocks lie on huge pages where the system has them.
inline Floats allocate(int64_t count) {
    const int64_t page = count * 4 < HUGE_PAGE ? 64 : HUGE_PAGE, bytes = padded(count * 4, page);
    Floats data(static_cast<float*>(std::aligned_alloc(page, bytes)));
    if (!data) std::abort();
#ifdef __linux__
    if (page == HUGE_PAGE) madvise(data.get(), bytes, MADV_HUGEPAGE);
#endif
    return data;
}

// Zeroed floats, as many as asked for and one vector more, so that whole vectors may be read.
class Buffer {
  public:
    Buffer() = default;
    explicit Buffer(int64_t count) { resize(count); }
    void resize(int64_t count) {
        data_ = allocate(count + LANES);
        std::memset(data_.get(), 0, (count + LANES) * 4);
    }
    operator float*() { return data_.get(); }
    operator const float*() const { return data_.get(); }

  private:
    Floats data_;
};

// Room for many matrices in few large blocks: weights are read from end to end in every step.
class Arena {
  public:
    float* take(int64_t count) {
        count = padded(count, 16);
        if (count > room_) {
            room_ = count > BLOCK ? count : BLOCK;
            blocks_.push_back(allocate(room_));
            next_ = blocks_.back().get();
        }
        float* taken = next_;
        next_ += count;
        room_ -= count;
        return taken;
    }

  private:
    static constexpr int64_t BLOCK = 1 << 23;  // 32 MiB, of which only what is written takes memory
    std::vector<Floats> blocks_;
    float* next_ = nullptr;
    int64_t room_ = 0;
};
