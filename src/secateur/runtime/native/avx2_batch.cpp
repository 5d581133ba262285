// AVX2 and FMA, many tokens. x lies in panels of 48 tokens, whose columns are six vectors; the sums of two rows fill
// twelve registers. A column that both rows keep is loaded once for both: loads, not sums, are what limits this.
#if defined(__AVX2__) && defined(__FMA__)
#include "avx2.h"
#include "batch.h"
#include "kernels.h"

namespace secateur::avx2_batch {
namespace {

// Lanes of the bits that are set, in order.
struct Compress {
    alignas(32) uint32_t lanes[256][LANES];
    uint64_t places[256];  // one byte a lane
};

constexpr Compress compress() {
    Compress table{};
    for (unsigned mask = 0; mask < 256; ++mask) {
        int rank = 0;
        for (unsigned lane = 0; lane < LANES; ++lane)
            if (mask >> lane & 1) {
                table.lanes[mask][rank] = lane;
                table.places[mask] |= uint64_t{lane} << (8 * rank++);
            }
    }
    return table;
}

constexpr Compress COMPRESS = compress();

// The three lists of one block of two rows while they grow, eight entries at a time.
struct Lists {
    static constexpr int SLOT = BLOCK + LANES;
    int lengths[3];
    uint8_t places[3][SLOT];
    float values[4][SLOT];  // of the first list for both rows, of the others

    void append(int list, int64_t column, unsigned mask) {
        const uint64_t lanes = COMPRESS.places[mask] + 0x0101010101010101u * static_cast<uint64_t>(column);
        std::memcpy(places[list] + lengths[list], &lanes, sizeof(lanes));
    }

    void append(int of, int list, __m256 v, unsigned mask) {
        const auto lanes = _mm256_load_si256(reinterpret_cast<const __m256i*>(COMPRESS.lanes[mask]));
        _mm256_storeu_ps(values[of] + lengths[list], _mm256_permutevar8x32_ps(v, lanes));
    }

    void grow(int list, unsigned mask) { lengths[list] += static_cast<int>(_mm_popcnt_u32(mask)); }
};

void put(float*& to, float value) { *to++ = value; }
void put(uint16_t*& to, float value) { *to++ = narrow(value); }  // exact: it was bfloat16 before

template <typename To>
void flush(const Lists& lists, uint8_t* counts, uint8_t*& places, To*& values) {
    for (int list = 0; list < 3; ++list) {
        counts[list] = static_cast<uint8_t>(lists.lengths[list]);
        if (lists.lengths[list]) std::memcpy(places, lists.places[list], static_cast<size_t>(lists.lengths[list]));
        places += lists.lengths[list];
    }
    for (int i = 0; i < lists.lengths[0]; ++i) put(values, lists.values[0][i]), put(values, lists.values[1][i]);
    for (int list = 1; list < 3; ++list)
        for (int i = 0; i < lists.lengths[list]; ++i) put(values, lists.values[1 + list][i]);
}

// Values of group g in columns [from, from + width) begin at p, which moves on.
template <class V, typename To>
void plan_group(const Bitmask& w, int64_t g, int64_t from, int64_t width, const typename V::value*& p, uint8_t* counts,
                uint8_t*& places, To*& values) {
    const int64_t K = w.columns, scales = w.type == INT8 ? K / w.group : 0;
    Lists lists[ROWS / 2];
    for (auto& one : lists) one.lengths[0] = one.lengths[1] = one.lengths[2] = 0;
    for (int64_t j = 0; j < width; j += V::STEP) {
        const uint8_t* words = w.mask + (g * K + from + j) * ROWS / 8;
        for (int i = 0; i < ROWS / 2; ++i) {
            Lists& pair = lists[i];
            typename V::word word[2];
            std::memcpy(word, words + 2 * i * sizeof(word[0]), sizeof(word));
            const typename V::value* rows[2] = {p, p + _mm_popcnt_u64(word[0])};
            p = rows[1] + _mm_popcnt_u64(word[1]);
            __m256 scale[2];
            for (int r = 0; scales && r < 2; ++r) {
                const uint16_t narrowed = w.scales[(g * ROWS + 2 * i + r) * scales + (from + j) / w.group];
                scale[r] = _mm256_set1_ps(widen(narrowed) * 0x1p-24f);
            }
#pragma GCC unroll 8
            for (int h = 0; h < V::STEP / LANES; ++h) {
                const unsigned a = uint64_t{word[0]} >> (LANES * h) & 255, b = uint64_t{word[1]} >> (LANES * h) & 255;
                __m256 va = V::expand(rows[0], a * 32), vb = V::expand(rows[1], b * 32);
                if (scales) va = _mm256_mul_ps(va, scale[0]), vb = _mm256_mul_ps(vb, scale[1]);
                rows[0] += _mm_popcnt_u32(a);
                rows[1] += _mm_popcnt_u32(b);
                const unsigned masks[3] = {a & b, a & ~b, b & ~a};
                pair.append(0, 0, va, masks[0]);
                pair.append(1, 0, vb, masks[0]);
                pair.append(2, 1, va, masks[1]);
                pair.append(3, 2, vb, masks[2]);
                for (int list = 0; list < 3; ++list) {
                    pair.append(list, j + LANES * h, masks[list]);
                    pair.grow(list, masks[list]);
                }
            }
        }
    }
    for (int i = 0; i < ROWS / 2; ++i) flush(lists[i], counts + 3 * i, places, values);
}

template <class V, typename To>
void plan_chunk(const Bitmask& w, int64_t chunk, int64_t slot, const int64_t* offsets, uint8_t* counts, uint8_t* places,
                To* values) {
    constexpr int GROUPS = CHUNK / ROWS;
    const int64_t K = w.columns, blocks = (K + BLOCK - 1) / BLOCK, all = (w.rows + ROWS - 1) / ROWS;
    const int64_t groups = least(GROUPS, all - chunk * GROUPS);
    const typename V::value* p[GROUPS];
    for (int64_t i = 0; i < groups; ++i)
        p[i] = static_cast<const typename V::value*>(w.values) + w.starts[chunk * GROUPS + i];
    for (int64_t b = 0; b < blocks; ++b) {
        const int64_t at = slot * blocks + b, from = b * BLOCK;
        uint8_t* count = counts + at * CHUNK / 2 * 3;
        uint8_t* place = places + offsets[2 * at];
        To* value = values + offsets[2 * at + 1];
        std::memset(count, 0, CHUNK / 2 * 3);
        for (int64_t i = 0; i < groups; ++i, count += ROWS / 2 * 3)
            plan_group<V>(w, chunk * GROUPS + i, from, least(BLOCK, K - from), p[i], count, place, value);
    }
}

// Six vectors of eight tokens.
struct Batch : Avx2 {
    static constexpr int VECTORS = avx2_batch::VECTORS;
    static __m256 load(const float* p) { return _mm256_load_ps(p); }
    static void store(float* p, __m256 v) { _mm256_store_ps(p, v); }
    static __m256 once(__m256 v) {
        asm("" : "+x"(v));  // one load for both rows: gcc would fold it into each
        return v;
    }
    static __m256 spread(const float* value) { return _mm256_broadcast_ss(value); }
    static __m256 spread(const uint16_t* value) {
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_set1_epi16(static_cast<int16_t>(*value)), 16));
    }
    static void spread_two(const float* values, __m256& a, __m256& b) { a = spread(values), b = spread(values + 1); }
    static void spread_two(const uint16_t* values, __m256& a, __m256& b) {
        uint32_t both;
        std::memcpy(&both, values, sizeof(both));
        const __m256i all = _mm256_set1_epi32(static_cast<int32_t>(both));
        a = _mm256_castsi256_ps(_mm256_slli_epi32(all, 16));
        b = _mm256_castsi256_ps(_mm256_and_si256(all, _mm256_set1_epi32(static_cast<int32_t>(0xffff0000u))));
    }
    template <typename V>
    static __m256 multiplied(__m256 values, __m256 x, __m256 sum) {
        return _mm256_fmadd_ps(values, x, sum);
    }
};

// Eight rows of eight entries become eight columns: `from` strides by `width`, `to` by a panel.
void turn(const float* const rows[LANES], float* to) {
    __m256 a[8], b[8];
    for (int i = 0; i < 8; ++i) a[i] = _mm256_loadu_ps(rows[i]);
    for (int i = 0; i < 8; i += 2) {
        b[i] = _mm256_unpacklo_ps(a[i], a[i + 1]);
        b[i + 1] = _mm256_unpackhi_ps(a[i], a[i + 1]);
    }
    for (int i = 0; i < 8; i += 4)
        for (int j = 0; j < 2; ++j) {
            a[i + 2 * j] = _mm256_shuffle_ps(b[i + j], b[i + j + 2], 0x44);
            a[i + 2 * j + 1] = _mm256_shuffle_ps(b[i + j], b[i + j + 2], 0xee);
        }
    for (int i = 0; i < 4; ++i) {
        _mm256_storeu_ps(to + i * PANEL, _mm256_permute2f128_ps(a[i], a[i + 4], 0x20));
        _mm256_storeu_ps(to + (i + 4) * PANEL, _mm256_permute2f128_ps(a[i], a[i + 4], 0x31));
    }
}

// Entry k of a token of x: a number, or a pair of bfloat16.
float entry_of(const void* x, int32_t type, int64_t width, int64_t token, int64_t k) {
    if (type == F32) return static_cast<const float*>(x)[token * width + k];
    const auto* halves = static_cast<const uint16_t*>(x) + token * width;
    if (type == BF16) return widen(halves[k]);
    const uint32_t high = 2 * k + 1 < width ? halves[2 * k + 1] : 0;
    const uint32_t both = high << 16 | halves[2 * k];
    float pair;
    std::memcpy(&pair, &both, 4);
    return pair;
}

}  // namespace

void to_panel(const void* x, int32_t type, int64_t tokens, int64_t width, int64_t columns, float* panel) {
    const int64_t entries = type == PAIRS ? (width + 1) / 2 : width, whole = type == PAIRS ? width / 2 : width;
    alignas(32) float tile[LANES][LANES];
    for (int64_t t = 0; t < PANEL; t += LANES)
        for (int64_t k = 0; k < columns; k += LANES) {
            const float* rows[LANES];
            for (int64_t i = 0; i < LANES; ++i) {
                rows[i] = tile[i];
                if (t + i < tokens && k + LANES <= whole) {
                    const int64_t token = (t + i) * width;
                    if (type == F32) rows[i] = static_cast<const float*>(x) + token + k;
                    else {
                        const auto* halves = static_cast<const uint16_t*>(x) + token;
                        if (type == PAIRS) std::memcpy(tile[i], halves + 2 * k, sizeof(tile[i]));
                        else _mm256_store_ps(tile[i], Avx2::load(halves + k));
                    }
                } else
                    for (int64_t b = 0; b < LANES; ++b)
                        tile[i][b] = t + i < tokens && k + b < entries ? entry_of(x, type, width, t + i, k + b) : 0.0f;
            }
            turn(rows, panel + k * PANEL + t);
        }
}

void plan(const Bitmask& w, int64_t chunk, int64_t slot, const int64_t* offsets, uint8_t* counts, uint8_t* places,
          void* values) {
    if (w.type == F32) plan_chunk<Float>(w, chunk, slot, offsets, counts, places, static_cast<float*>(values));
    if (w.type == BF16) plan_chunk<Bfloat>(w, chunk, slot, offsets, counts, places, static_cast<uint16_t*>(values));
    if (w.type == INT8) plan_chunk<Byte>(w, chunk, slot, offsets, counts, places, static_cast<float*>(values));
}

void planned(const Plan& w, const float* panels, int64_t tokens, const Output& out, int64_t first, int64_t last,
             float* sums) {
    planned_by<Batch>(w, panels, tokens, out, first, last, sums);
}

}  // namespace secateur::avx2_batch
#endif
