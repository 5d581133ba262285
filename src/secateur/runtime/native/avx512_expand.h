// Expansion of 16-bit and 8-bit lanes, which came with VBMI2.
#pragma once
#include "avx512.h"

namespace secateur {
namespace {

SECATEUR_EXPAND(epi16, "vpexpandw", __m512i, uint32_t)
SECATEUR_EXPAND(epi8, "vpexpandb", __m512i, uint64_t)

// 32 bfloat16 by one expansion: even columns, moved to the tops of the lanes, then odd ones. x is dealt out alike.
struct BfloatSteps : Avx512 {
    using value = uint16_t;
    using word = uint32_t;
    using input = float;
    static constexpr int STEP = 32, VECTORS = 2;

    template <bool DENSE>
    struct Step {
        word mask;
        __m512i all{};
        explicit Step(word w) : mask(w) {}
        __m512 next(const value*& p, int h) {
            if (h == 0) {
                all = _mm512_loadu_si512(p);
                if (!DENSE) all = expand_epi16(all, mask);
                p += DENSE ? 32 : _mm_popcnt_u32(mask);
                return _mm512_castsi512_ps(_mm512_slli_epi32(all, 16));
            }
            const __m512i high = _mm512_set1_epi32(static_cast<int32_t>(0xffff0000u));
            return _mm512_castsi512_ps(_mm512_and_si512(all, high));
        }
    };
};

// 64 levels by one expansion, a quarter of them at a time in the tops of the lanes: 2^24 times too large.
struct ByteSteps : Avx512 {
    using value = int8_t;
    using word = uint64_t;
    using input = float;
    static constexpr int STEP = 64, VECTORS = 4;
    static constexpr float SCALE = 0x1p-24f;

    template <bool DENSE>
    struct Step {
        word mask;
        __m512i all{};
        explicit Step(word w) : mask(w) {}
        __m512 next(const value*& p, int h) {
            if (h == 0) {
                all = expand_epi8(_mm512_loadu_si512(p), mask);
                p += _mm_popcnt_u64(mask);
            }
            const __m512i high = _mm512_set1_epi32(static_cast<int32_t>(0xff000000u));
            const __m512i moved = h == 3 ? all : _mm512_slli_epi32(all, static_cast<unsigned>(24 - 8 * h));
            return _mm512_cvtepi32_ps(_mm512_and_si512(moved, high));
        }
    };
};

inline Input dealt(int32_t weight, int32_t) { return weight == BF16 ? DEALT_2 : weight == INT8 ? DEALT_4 : IN_ORDER; }

inline void bitmask_expanded(const Bitmask& w, const void* x, int64_t tokens, const Output& out, int64_t first,
                             int64_t last) {
    if (w.type == F32) streamed<FloatSteps, false>(w, x, tokens, out, first, last);
    if (w.type == BF16) streamed<BfloatSteps, false>(w, x, tokens, out, first, last);
    if (w.type == INT8) streamed<ByteSteps, false>(w, x, tokens, out, first, last);
}

inline void dense_expanded(const Dense& w, const void* x, int64_t tokens, const Output& out, int64_t first,
                           int64_t last) {
    if (w.type == F32) streamed<FloatSteps, true>(w, x, tokens, out, first, last);
    if (w.type == BF16) streamed<BfloatSteps, true>(w, x, tokens, out, first, last);
}

}  // namespace
}  // namespace secateur
