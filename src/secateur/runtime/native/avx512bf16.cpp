// AVX-512 with VBMI2 and dot products of bfloat16: Zen 4, Sapphire Rapids and later. Where weights and x are bfloat16
// two columns are multiplied and added at once; the products are exact, and numbers below 2^-126 count as zero.
#if (defined(__AVX512VBMI2__) && defined(__AVX512BF16__)) || defined(SECATEUR_EMULATED)
#include "avx512_expand.h"

#include <type_traits>

namespace secateur {
namespace {

__m512 dot(__m512 sum, __m512 a, __m512 b) {
    return _mm512_dpbf16_ps(sum, (__m512bh)_mm512_castps_si512(a), (__m512bh)_mm512_castps_si512(b));
}

// 32 bfloat16 by one expansion, beside 32 of x.
struct DotSteps : Avx512 {
    using value = uint16_t;
    using word = uint32_t;
    using input = uint16_t;
    static constexpr int STEP = 32, VECTORS = 1;
    static __m512 fma(__m512 a, __m512 b, __m512 sum) { return dot(sum, a, b); }
    static __m512 x(const uint16_t* column, int) { return _mm512_castsi512_ps(_mm512_loadu_si512(column)); }

    template <bool DENSE>
    struct Step {
        word mask;
        explicit Step(word w) : mask(w) {}
        __m512 next(const value*& p, int) const {
            const __m512i v = _mm512_loadu_si512(p);
            p += DENSE ? 32 : _mm_popcnt_u32(mask);
            return _mm512_castsi512_ps(DENSE ? v : expand_epi16(v, mask));
        }
    };
};

Input wanted(int32_t weight, int32_t x) { return weight == BF16 && x == BF16 ? AS_BF16 : dealt(weight, x); }

// The type of the output is that of x.
void bitmask(const Bitmask& w, const void* x, int64_t tokens, const Output& out, int64_t first, int64_t last) {
    if (wanted(w.type, out.type) == AS_BF16) streamed<DotSteps, false>(w, x, tokens, out, first, last);
    else bitmask_expanded(w, x, tokens, out, first, last);
}

void dense(const Dense& w, const void* x, int64_t tokens, const Output& out, int64_t first, int64_t last) {
    if (wanted(w.type, out.type) == AS_BF16) streamed<DotSteps, true>(w, x, tokens, out, first, last);
    else dense_expanded(w, x, tokens, out, first, last);
}

struct DotBatch : Batch {
    template <typename V>
    static __m512 multiplied(__m512 values, __m512 x, __m512 sum) {
        if constexpr (std::is_same_v<V, Pair>) return dot(sum, values, x);
        else return _mm512_fmadd_ps(values, x, sum);
    }
};

void planned(const Plan& w, const float* panels, int64_t tokens, const Output& out, int64_t first, int64_t last,
             float* sums) {
    planned_by<DotBatch, true>(w, panels, tokens, out, first, last, sums);
}

}  // namespace

const Kernels* avx512bf16() {
    using avx2_batch::PANEL, avx2_batch::plan, avx2_batch::to_panel;
    static const Kernels kernels{"avx512bf16", wanted,   bitmask, indexed_of<Avx2>, blocks_of_rows<Avx512>, dense,
                                 PANEL,        to_panel, plan,    planned,          true};
    return &kernels;
}

}  // namespace secateur
#else
#include "kernels.h"
const secateur::Kernels* secateur::avx512bf16() { return nullptr; }
#endif
