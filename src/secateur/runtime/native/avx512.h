// What the files for AVX-512 share. `SECATEUR_EMULATED` is set by the tests, which bring these intrinsics as plain C++
// to processors without them.
#pragma once
#include <immintrin.h>

#include "avx2.h"
#include "batch.h"
#include "kernels.h"
#include "streaming.h"

namespace secateur {
namespace {

// The expansions are done in place: with another destination, even one whose lanes are zeroed, they wait on some
// processors (Zen 4) for what was in it before.
#if defined(SECATEUR_EMULATED)
#define SECATEUR_EXPAND(name, instruction, type, mask_type) \
    inline type expand_##name(type v, mask_type mask) { return _mm512_maskz_expand_##name(mask, v); }
#else
#define SECATEUR_EXPAND(name, instruction, type, mask_type)                \
    inline type expand_##name(type v, mask_type mask) {                    \
        asm(instruction " %0, %0%{%1%}%{z%}" : "+v"(v) : "Yk"(mask));      \
        return v;                                                          \
    }
#endif

SECATEUR_EXPAND(ps, "vexpandps", __m512, uint16_t)
SECATEUR_EXPAND(epi32, "vpexpandd", __m512i, uint16_t)

inline __m512i sixteen(const uint16_t* p) {
    return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline __m512i sixteen(const int8_t* p) {
    return _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}

struct Avx512 {
    using Vec = __m512;
    static constexpr int LANES = 16, TOKENS = 6;
    static constexpr float SCALE = 1.0f;
    static Vec zero() { return _mm512_setzero_ps(); }
    static Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
    static Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
    static Vec scaled(Vec v, float scale, Vec total) { return _mm512_fmadd_ps(v, _mm512_set1_ps(scale), total); }
    static float sum(Vec v) { return _mm512_reduce_add_ps(v); }
    static Vec all(float value) { return _mm512_set1_ps(value); }
    static Vec load(const float* p) { return _mm512_loadu_ps(p); }
    static Vec load(const uint16_t* p) { return _mm512_castsi512_ps(_mm512_slli_epi32(sixteen(p), 16)); }
    static Vec x(const float* column, int h) { return _mm512_loadu_ps(column + LANES * h); }
};

// float32: one expansion a step.
struct FloatSteps : Avx512 {
    using value = float;
    using word = uint16_t;
    using input = float;
    static constexpr int STEP = 16, VECTORS = 1;

    template <bool DENSE>
    struct Step {
        word mask;
        explicit Step(word w) : mask(w) {}
        __m512 next(const value*& p, int) const {
            const __m512 v = _mm512_loadu_ps(p);
            p += DENSE ? 16 : _mm_popcnt_u32(mask);
            return DENSE ? v : expand_ps(v, mask);
        }
    };
};

// bfloat16 and int8 where only 32-bit lanes can be expanded: widened first, sixteen at a time.
template <typename V, typename Word>
struct WidenedSteps : Avx512 {
    using value = V;
    using word = Word;
    using input = float;
    static constexpr int STEP = 8 * sizeof(Word), VECTORS = STEP / LANES;

    template <bool DENSE>
    struct Step {
        word mask;
        explicit Step(word w) : mask(w) {}
        __m512 next(const value*& p, int h) const {
            __m512i v = sixteen(p);
            if constexpr (DENSE) p += 16;
            else {
                const auto part = static_cast<uint16_t>(mask >> (16 * h));
                v = expand_epi32(v, part);
                p += _mm_popcnt_u32(part);
            }
            return sizeof(V) == 2 ? _mm512_castsi512_ps(_mm512_slli_epi32(v, 16)) : _mm512_cvtepi32_ps(v);
        }
    };
};

// Three vectors of sixteen tokens. A panel is as wide as that of AVX2, so that panels and plans are made by its code.
struct Batch : Avx512 {
    static constexpr int VECTORS = 3;
    static_assert(VECTORS * LANES == avx2_batch::PANEL);
    static __m512 load(const float* p) { return _mm512_load_ps(p); }
    static void store(float* p, __m512 v) { _mm512_store_ps(p, v); }
    static __m512 once(__m512 v) {
#if !defined(SECATEUR_EMULATED)
        asm("" : "+v"(v));  // one load for both rows
#endif
        return v;
    }
    static __m512 spread(const float* value) { return _mm512_set1_ps(*value); }
    static __m512 spread(const uint16_t* value) { return _mm512_set1_ps(widen(*value)); }
    static __m512 spread(const Pair* value) {
        return _mm512_castsi512_ps(_mm512_set1_epi32(static_cast<int32_t>(*value)));
    }
    template <typename V>
    static void spread_two(const V* values, __m512& a, __m512& b) {
        a = spread(values), b = spread(values + 1);
    }
    template <typename V>
    static __m512 multiplied(__m512 values, __m512 x, __m512 sum) {
        return _mm512_fmadd_ps(values, x, sum);
    }
};

inline void planned_f32(const Plan& w, const float* panels, int64_t tokens, const Output& out, int64_t first,
                        int64_t last, float* sums) {
    planned_by<Batch>(w, panels, tokens, out, first, last, sums);
}

}  // namespace
}  // namespace secateur
