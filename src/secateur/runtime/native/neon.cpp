// NEON, which every 64-bit ARM processor has. Four columns at a time: half a byte of the mask chooses how the bytes of
// the next values spread over four lanes; bfloat16 values land in the upper halves, int8 values in the top bytes.
#if defined(__aarch64__) && !defined(__ARM_BIG_ENDIAN)
#include <arm_neon.h>

#include "kernels.h"
#include "portable_batch.h"
#include "streaming.h"

namespace secateur {
namespace {

struct Table {
    alignas(16) uint8_t of[16][16];
};

// For vqtbl1q: the `width` bytes of a value go to the top of its lane, all others become zero.
constexpr Table byte_lanes(int width) {
    Table table{};
    for (int mask = 0; mask < 16; ++mask) {
        int rank = 0;
        for (int lane = 0; lane < 4; ++lane) {
            const bool kept = mask >> lane & 1;
            for (int byte = 0; byte < 4; ++byte) {
                const int from = byte - (4 - width);
                table.of[mask][4 * lane + byte] = kept && from >= 0 ? static_cast<uint8_t>(rank * width + from) : 255;
            }
            rank += kept;
        }
    }
    return table;
}

constexpr Table LANES_OF[3] = {byte_lanes(4), byte_lanes(2), byte_lanes(1)};
constexpr uint8_t COUNTS[16] = {0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4};

struct Neon {
    using Vec = float32x4_t;
    static constexpr int LANES = 4, TOKENS = 4;
    static constexpr float SCALE = 1.0f;
    static Vec zero() { return vdupq_n_f32(0); }
    static Vec add(Vec a, Vec b) { return vaddq_f32(a, b); }
    static Vec fma(Vec a, Vec b, Vec c) { return vfmaq_f32(c, a, b); }
    static Vec scaled(Vec v, float scale, Vec total) { return vfmaq_n_f32(total, v, scale); }
    static float sum(Vec v) { return vaddvq_f32(v); }
    static Vec x(const float* column, int h) { return vld1q_f32(column + 4 * h); }

    static uint8x16_t bytes(const float* p) { return vld1q_u8(reinterpret_cast<const uint8_t*>(p)); }
    static uint8x16_t bytes(const uint16_t* p) {
        const uint8x8_t eight = vld1_u8(reinterpret_cast<const uint8_t*>(p));
        return vcombine_u8(eight, eight);
    }
    static uint8x16_t bytes(const int8_t* p) {
        uint32_t four;
        std::memcpy(&four, p, 4);
        return vreinterpretq_u8_u32(vdupq_n_u32(four));
    }
    static Vec number(const float*, uint8x16_t v) { return vreinterpretq_f32_u8(v); }
    static Vec number(const uint16_t*, uint8x16_t v) { return vreinterpretq_f32_u8(v); }
    static Vec number(const int8_t*, uint8x16_t v) { return vcvtq_n_f32_s32(vreinterpretq_s32_u8(v), 24); }

    // Of the four values from p on, those of the half byte.
    template <typename V>
    static Vec expand(const V* p, unsigned half) {
        constexpr int TABLE = sizeof(V) == 4 ? 0 : sizeof(V) == 2 ? 1 : 2;
        return number(p, vqtbl1q_u8(bytes(p), vld1q_u8(LANES_OF[TABLE].of[half])));
    }
    static Vec all(float value) { return vdupq_n_f32(value); }
    template <typename V>
    static Vec load(const V* p) {
        return expand(p, 15);
    }
    template <typename V>
    static void widened(const V* p, float* to) {
        vst1q_f32(to, expand(p, 15));
        vst1q_f32(to + 4, expand(p + 4, 15));
    }
};

template <typename V, typename Word>
struct Steps : Neon {
    using value = V;
    using word = Word;
    using input = float;
    static constexpr int STEP = 8 * sizeof(Word), VECTORS = STEP / 4;

    template <bool DENSE>
    struct Step {
        word bits;
        explicit Step(word w) : bits(w) {}
        Vec next(const value*& p, int h) const {
            const unsigned half = DENSE ? 15 : bits >> (4 * h) & 15;
            const Vec v = expand(p, half);
            p += DENSE ? 4 : COUNTS[half];
            return v;
        }
    };
};

using FloatSteps = Steps<float, uint16_t>;
using BfloatSteps = Steps<uint16_t, uint32_t>;
using ByteSteps = Steps<int8_t, uint64_t>;

void bitmask(const Bitmask& w, const void* x, int64_t tokens, const Output& out, int64_t first, int64_t last) {
    if (w.type == F32) streamed<FloatSteps, false>(w, x, tokens, out, first, last);
    if (w.type == BF16) streamed<BfloatSteps, false>(w, x, tokens, out, first, last);
    if (w.type == INT8) streamed<ByteSteps, false>(w, x, tokens, out, first, last);
}

void dense(const Dense& w, const void* x, int64_t tokens, const Output& out, int64_t first, int64_t last) {
    if (w.type == F32) streamed<FloatSteps, true>(w, x, tokens, out, first, last);
    if (w.type == BF16) streamed<BfloatSteps, true>(w, x, tokens, out, first, last);
}

}  // namespace

const Kernels* neon() {
    using namespace portable_batch;
    static const Kernels kernels{"neon", in_order, bitmask, indexed_of<Neon>, blocks_of_rows<Neon>, dense,
                                 PANEL,  to_panel, nullptr, planned,          false};
    return &kernels;
}

}  // namespace secateur
#else
#include "kernels.h"
const secateur::Kernels* secateur::neon() { return nullptr; }
#endif
