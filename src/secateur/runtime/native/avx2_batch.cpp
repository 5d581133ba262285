// AVX2 and FMA, many tokens. x lies in panels of 48 tokens, whose columns are six vectors; the sums of two rows fill
// twelve registers. A column that both rows keep is loaded once for both: loads, not sums, are what limits this.
#if defined(__AVX2__) && defined(__FMA__)
#include "avx2.h"
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

// A value in all lanes.
__m256 spread(const float* value) { return _mm256_broadcast_ss(value); }
__m256 spread(const uint16_t* value) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_set1_epi16(static_cast<int16_t>(*value)), 16));
}
void spread_two(const float* values, __m256& a, __m256& b) {
    a = spread(values);
    b = spread(values + 1);
}
void spread_two(const uint16_t* values, __m256& a, __m256& b) {
    uint32_t both;
    std::memcpy(&both, values, sizeof(both));
    const __m256i all = _mm256_set1_epi32(static_cast<int32_t>(both));
    a = _mm256_castsi256_ps(_mm256_slli_epi32(all, 16));
    b = _mm256_castsi256_ps(_mm256_and_si256(all, _mm256_set1_epi32(static_cast<int32_t>(0xffff0000u))));
}

// sums[.][n] += values[i] * x[places[i]][n]
template <typename V, int N, int SETS>
void add_list(const V* values, const uint8_t* places, int count, const float* x, __m256 (&sums)[SETS][N]) {
    int i = 0;
    for (; i + SETS <= count; i += SETS)
#pragma GCC unroll 4
        for (int s = 0; s < SETS; ++s) {
            const __m256 value = spread(values + i + s);
            const float* column = x + places[i + s] * PANEL;
#pragma GCC unroll 6
            for (int n = 0; n < N; ++n) sums[s][n] = _mm256_fmadd_ps(value, _mm256_load_ps(column + LANES * n), sums[s][n]);
        }
    for (; SETS > 1 && i < count; ++i) {
        const __m256 value = spread(values + i);
        const float* column = x + places[i] * PANEL;
#pragma GCC unroll 6
        for (int n = 0; n < N; ++n) sums[0][n] = _mm256_fmadd_ps(value, _mm256_load_ps(column + LANES * n), sums[0][n]);
    }
}

// y[r] += rows of one chunk and block times x, for N vectors of tokens. Meanwhile `next` comes into the second cache.
template <typename V, int N>
void multiply(const uint8_t* counts, const uint8_t* places, const void* stream, int64_t pairs, const float* x, float* y,
              const float* next) {
    constexpr int SETS = N == 1 ? 4 : N <= 3 ? 2 : 1;  // sums of a row, to hide the latency of the FMA
    constexpr int PART = BLOCK * PANEL / (CHUNK / 2);
    const auto* values = static_cast<const V*>(stream);
    for (int64_t p = 0; p < pairs; ++p, counts += 3, y += 2 * PANEL, next += PART) {
        for (int i = 0; i < PART; i += 16) _mm_prefetch(reinterpret_cast<const char*>(next + i), _MM_HINT_T1);
        __m256 first[SETS][N], second[SETS][N];
#pragma GCC unroll 6
        for (int n = 0; n < N; ++n) {
            first[0][n] = _mm256_load_ps(y + LANES * n);
            second[0][n] = _mm256_load_ps(y + PANEL + LANES * n);
#pragma GCC unroll 4
            for (int s = 1; s < SETS; ++s) first[s][n] = second[s][n] = _mm256_setzero_ps();
        }
        for (int i = 0; i < counts[0]; ++i) {
            __m256 a, b;
            spread_two(values + 2 * i, a, b);
            const float* column = x + places[i] * PANEL;
#pragma GCC unroll 6
            for (int n = 0; n < N; ++n) {
                __m256 some = _mm256_load_ps(column + LANES * n);
                asm("" : "+x"(some));  // one load for both: gcc would fold it into each
                first[0][n] = _mm256_fmadd_ps(a, some, first[0][n]);
                second[0][n] = _mm256_fmadd_ps(b, some, second[0][n]);
            }
        }
        values += 2 * counts[0], places += counts[0];
        add_list<V, N, SETS>(values, places, counts[1], x, first);
        values += counts[1], places += counts[1];
        add_list<V, N, SETS>(values, places, counts[2], x, second);
        values += counts[2], places += counts[2];
#pragma GCC unroll 6
        for (int n = 0; n < N; ++n) {
#pragma GCC unroll 4
            for (int s = 1; s < SETS; ++s) {
                first[0][n] = _mm256_add_ps(first[0][n], first[s][n]);
                second[0][n] = _mm256_add_ps(second[0][n], second[s][n]);
            }
            _mm256_store_ps(y + LANES * n, first[0][n]);
            _mm256_store_ps(y + PANEL + LANES * n, second[0][n]);
        }
    }
}

using Multiply = void (*)(const uint8_t*, const uint8_t*, const void*, int64_t, const float*, float*, const float*);

template <typename V>
Multiply of_vectors(int64_t vectors) {
    static constexpr Multiply all[VECTORS] = {multiply<V, 1>, multiply<V, 2>, multiply<V, 3>,
                                              multiply<V, 4>, multiply<V, 5>, multiply<V, 6>};
    return all[vectors - 1];
}

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

}  // namespace

void to_panel(const void* x, int32_t type, int64_t tokens, int64_t width, int64_t columns, float* panel) {
    alignas(32) float tile[LANES][LANES];
    for (int64_t t = 0; t < PANEL; t += LANES)
        for (int64_t k = 0; k < columns; k += LANES) {
            const float* rows[LANES];
            for (int64_t i = 0; i < LANES; ++i) {
                const int64_t from = (t + i) * width + k;
                rows[i] = tile[i];
                if (t + i < tokens && k + LANES <= width) {
                    if (type == F32) rows[i] = static_cast<const float*>(x) + from;
                    else _mm256_store_ps(tile[i], Bfloat::expand(static_cast<const uint16_t*>(x) + from, 255 * 32));
                } else {
                    for (int64_t b = 0; b < LANES; ++b) {
                        const bool is = t + i < tokens && k + b < width;
                        if (type == F32) tile[i][b] = is ? static_cast<const float*>(x)[from + b] : 0.0f;
                        else tile[i][b] = is ? widen(static_cast<const uint16_t*>(x)[from + b]) : 0.0f;
                    }
                }
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
    const int64_t K = w.columns, blocks = (K + BLOCK - 1) / BLOCK, count = (tokens + PANEL - 1) / PANEL;
    const int64_t rows = (last - first) * CHUNK, size = w.type == F32 ? 4 : 2;
    std::memset(sums, 0, static_cast<size_t>(count * rows * PANEL) * sizeof(float));
    for (int64_t b = 0; b < blocks; ++b)
        for (int64_t c = 0; c < count; ++c) {
            const int64_t vectors = (least(PANEL, tokens - c * PANEL) + LANES - 1) / LANES;
            const Multiply some = w.type == F32 ? of_vectors<float>(vectors) : of_vectors<uint16_t>(vectors);
            const float* x = panels + (c * K + b * BLOCK) * PANEL;
            const float* next = c + 1 < count    ? x + K * PANEL
                                : b + 1 < blocks ? panels + (b + 1) * BLOCK * PANEL
                                                 : panels;
            for (int64_t chunk = first; chunk < last; ++chunk) {
                const int64_t at = chunk * blocks + b, pairs = least(CHUNK, w.rows - chunk * CHUNK + 1) / 2;
                some(w.counts + at * CHUNK / 2 * 3, w.places + w.offsets[2 * at],
                     static_cast<const char*>(w.values) + w.offsets[2 * at + 1] * size, pairs, x,
                     sums + (c * rows + (chunk - first) * CHUNK) * PANEL, next);
            }
        }
    for (int64_t t = 0; t < tokens; ++t)
        for (int64_t r = 0; r < rows; ++r)
            store(out, t, first * CHUNK + r, sums[((t / PANEL) * rows + r) * PANEL + t % PANEL]);
}

}  // namespace secateur::avx2_batch
#endif
