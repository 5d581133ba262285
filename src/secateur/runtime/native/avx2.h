// What the files for AVX2 share.
#pragma once
#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace secateur {

struct Bitmask;
struct Plan;
struct Output;

template <typename Entry, int PER_LANE>
struct Table {
    alignas(64) Entry of[256][8 * PER_LANE];
};

// For vpermps: lane l takes the value of rank l; the sign bit marks lanes without one.
static constexpr Table<uint32_t, 1> f32_lanes() {
    Table<uint32_t, 1> table{};
    for (unsigned mask = 0; mask < 256; ++mask) {
        uint32_t rank = 0;
        for (int lane = 0; lane < 8; ++lane) table.of[mask][lane] = mask >> lane & 1 ? rank++ : 0x80000000u;
    }
    return table;
}

// For vpshufb: the `width` bytes of a value go to the top of its lane, all others become zero.
static constexpr Table<uint8_t, 4> byte_lanes(int width) {
    Table<uint8_t, 4> table{};
    for (unsigned mask = 0; mask < 256; ++mask) {
        int rank = 0;
        for (int lane = 0; lane < 8; ++lane) {
            const bool kept = mask >> lane & 1;
            for (int byte = 0; byte < 4; ++byte) {
                const int from = byte - (4 - width);
                table.of[mask][4 * lane + byte] =
                    kept && from >= 0 ? static_cast<uint8_t>(rank * width + from) : uint8_t{0x80};
            }
            rank += kept;
        }
    }
    return table;
}

static constexpr auto F32_LANES = f32_lanes();
static constexpr auto BF16_LANES = byte_lanes(2);
static constexpr auto INT8_LANES = byte_lanes(1);

static inline __m256i entry(const void* table, uint64_t at) {
    return _mm256_load_si256(reinterpret_cast<const __m256i*>(static_cast<const char*>(table) + at));
}

// Unnamed: each file compiles its own with its own instructions.
namespace {

// What the kernels need of a vector.
struct Avx2 {
    using Vec = __m256;
    static constexpr int LANES = 8, TOKENS = 3;
    static Vec zero() { return _mm256_setzero_ps(); }
    static Vec add(Vec a, Vec b) { return _mm256_add_ps(a, b); }
    static Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
    static Vec scaled(Vec v, float scale, Vec total) { return _mm256_fmadd_ps(v, _mm256_set1_ps(scale), total); }
    static float sum(Vec v) {
        __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
        s = _mm_add_ps(s, _mm_movehl_ps(s, s));
        return _mm_cvtss_f32(_mm_add_ss(s, _mm_shuffle_ps(s, s, 1)));
    }
    static Vec all(float value) { return _mm256_set1_ps(value); }
    static Vec load(const float* p) { return _mm256_loadu_ps(p); }
    static Vec load(const uint16_t* p) {
        const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
        return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
    }
    static Vec load(const int8_t* p) {
        int64_t eight;
        std::memcpy(&eight, p, 8);
        return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_cvtsi64_si128(eight)));
    }
    template <typename V>
    static void widened(const V* p, float* to) {
        _mm256_store_ps(to, load(p));
    }
};

// Eight columns: `at` is the byte of their mask times 32, where its entry lies in a table.
struct Float : Avx2 {
    using value = float;
    using word = uint16_t;
    static constexpr int STEP = 16;
    static __m256 expand(const value* p, uint64_t at) {
        const __m256i lanes = entry(&F32_LANES, at);
        const __m256 spread = _mm256_permutevar8x32_ps(_mm256_loadu_ps(p), lanes);
        return _mm256_blendv_ps(spread, _mm256_setzero_ps(), _mm256_castsi256_ps(lanes));
    }
};

struct Bfloat : Avx2 {
    using value = uint16_t;
    using word = uint32_t;
    static constexpr int STEP = 32;
    static __m256 expand(const value* p, uint64_t at) {
        const __m256i both = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
        return _mm256_castsi256_ps(_mm256_shuffle_epi8(both, entry(&BF16_LANES, at)));
    }
};

struct Byte : Avx2 {
    using value = int8_t;
    using word = uint64_t;
    static constexpr int STEP = 64;
    static __m256 expand(const value* p, uint64_t at) {
        int64_t eight;
        std::memcpy(&eight, p, 8);
        return _mm256_cvtepi32_ps(_mm256_shuffle_epi8(_mm256_set1_epi64x(eight), entry(&INT8_LANES, at)));
    }
};

// A type of values as the streaming kernels take it.
template <class Type>
struct Streamed : Type {
    using input = float;
    using typename Type::value;
    using typename Type::word;
    static constexpr int VECTORS = Type::STEP / 8;
    static constexpr float SCALE = 0x1p-24f;
    static __m256 x(const float* column, int h) { return _mm256_loadu_ps(column + 8 * h); }

    template <bool DENSE>
    struct Step {
        uint64_t bits;
        explicit Step(word w) : bits(w) {}
        __m256 next(const value*& p, int h) const {
            if constexpr (DENSE) {
                p += 8;
                return Avx2::load(p - 8);
            } else {
                // The byte of the mask times 32 is where its entry lies, and has as many bits set.
                const uint64_t at = (h ? bits >> (8 * h - 5) : bits << 5) & 0x1fe0u;
                const __m256 v = Type::expand(p, at);
                p += _mm_popcnt_u32(static_cast<uint32_t>(at));
                return v;
            }
        }
    };
};

}  // namespace

namespace avx2_batch {
constexpr int LANES = 8, VECTORS = 6, PANEL = LANES * VECTORS;
void to_panel(const void* x, int32_t type, int64_t tokens, int64_t width, int64_t columns, float* panel);
void plan(const Bitmask&, int64_t chunk, int64_t slot, const int64_t* offsets, uint8_t* counts, uint8_t* places, void*);
void planned(const Plan&, const float* panels, int64_t tokens, const Output&, int64_t first, int64_t last, float*);
}  // namespace avx2_batch

}  // namespace secateur
