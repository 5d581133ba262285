// AVX2 and FMA. Eight columns at a time: one byte of the mask chooses how the next values spread over a
// vector of eight float32. bfloat16 values land in the upper halves of their lanes, int8 values in the top
// bytes (so they are 2^24 times too large, which the scale undoes), and need no conversion of width.
#if defined(__AVX2__) && defined(__FMA__)
#include <immintrin.h>

#include "avx2.h"
#include "kernels.h"

namespace secateur {
namespace {

float sum_of(__m256 v) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_shuffle_ps(s, s, 1)));
}

constexpr int AHEAD = 4096;  // bytes of values that are fetched before they are needed

template <class V, int T>
void rows_of(const Bitmask& w, const float* x, int64_t token, const Output& out, int64_t first, int64_t last) {
    constexpr int CHUNKS = V::STEP / 8, LANES = T == 1 ? 2 : 1;  // two sums a row hide the latency of the FMA
    const int64_t K = w.columns, steps = K / V::STEP;
    const bool scaled = V::STEP == 64;
    const int64_t per_scale = scaled ? w.group / V::STEP : steps, scales = scaled ? K / w.group : 0;
    const uint8_t* mask = w.mask + first * ROWS * K / 8;
    const auto* p = static_cast<const typename V::value*>(w.values) + w.starts[first];
    x += token * K;
    for (int64_t g = first; g < last; ++g) {
        __m256 total[ROWS][T], sums[ROWS][T][LANES];
        for (int r = 0; r < ROWS; ++r)
            for (int t = 0; t < T; ++t) {
                total[r][t] = _mm256_setzero_ps();
                for (int l = 0; l < LANES; ++l) sums[r][t][l] = _mm256_setzero_ps();
            }
        for (int64_t from = 0, s = 0; from < steps; from += per_scale, ++s) {
            for (int64_t j = from; j < from + per_scale; ++j) {
                const float* column = x + j * V::STEP;
#pragma GCC unroll 4
                for (int r = 0; r < ROWS; ++r) {
                    if (r % 2 == 0) _mm_prefetch(reinterpret_cast<const char*>(p) + AHEAD, _MM_HINT_T0);
                    typename V::word word;
                    std::memcpy(&word, mask + r * CHUNKS, sizeof(word));
#pragma GCC unroll 8
                    for (int h = 0; h < CHUNKS; ++h) {
                        // The byte of the mask times 32 is where its entry lies, and has as many bits set.
                        const uint64_t at = (h ? uint64_t{word} >> (8 * h - 5) : uint64_t{word} << 5) & 0x1fe0u;
                        const __m256 v = V::expand(p, at);
                        p += _mm_popcnt_u32(static_cast<uint32_t>(at));
#pragma GCC unroll 8
                        for (int t = 0; t < T; ++t)
                            sums[r][t][h % LANES] =
                                _mm256_fmadd_ps(v, _mm256_loadu_ps(column + t * K + 8 * h), sums[r][t][h % LANES]);
                    }
                }
                mask += ROWS * CHUNKS;
            }
            if (scaled) {
#pragma GCC unroll 4
                for (int r = 0; r < ROWS; ++r) {
                    const __m256 scale = _mm256_set1_ps(widen(w.scales[(g * ROWS + r) * scales + s]) * 0x1p-24f);
#pragma GCC unroll 8
                    for (int t = 0; t < T; ++t) {
                        __m256 part = sums[r][t][0];
                        if (LANES == 2) part = _mm256_add_ps(part, sums[r][t][LANES - 1]);
                        total[r][t] = _mm256_fmadd_ps(part, scale, total[r][t]);
                        for (int l = 0; l < LANES; ++l) sums[r][t][l] = _mm256_setzero_ps();
                    }
                }
            }
        }
        for (int r = 0; r < ROWS; ++r)
            for (int t = 0; t < T; ++t) {
                __m256 sum = scaled ? total[r][t] : sums[r][t][0];
                if (!scaled && LANES == 2) sum = _mm256_add_ps(sum, sums[r][t][LANES - 1]);
                store(out, token + t, g * ROWS + r, sum_of(sum));
            }
    }
}

template <class V>
void any_tokens(const Bitmask& w, const float* x, int64_t tokens, const Output& out, int64_t first, int64_t last) {
    int64_t t = 0;
    for (; t + 2 < tokens; t += 3) rows_of<V, 3>(w, x, t, out, first, last);
    if (tokens - t == 2) rows_of<V, 2>(w, x, t, out, first, last);
    if (tokens - t == 1) rows_of<V, 1>(w, x, t, out, first, last);
}

void bitmask(const Bitmask& w, const float* x, int64_t tokens, const Output& out, int64_t first, int64_t last) {
    if (w.type == F32) any_tokens<Float>(w, x, tokens, out, first, last);
    if (w.type == BF16) any_tokens<Bfloat>(w, x, tokens, out, first, last);
    if (w.type == INT8) any_tokens<Byte>(w, x, tokens, out, first, last);
}

__m256 load8(const float* p) { return _mm256_loadu_ps(p); }
__m256 load8(const uint16_t* p) {
    const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}

float number(float value) { return value; }
float number(uint16_t value) { return widen(value); }

template <typename V>
void one_token(const Indexed& w, const float* x, int64_t token, const Output& out, int64_t first, int64_t last) {
    const auto* values = static_cast<const V*>(w.values);
    x += token * w.columns;
    for (int64_t n = first; n < last; ++n) {
        int64_t at = w.starts[n];
        const int64_t end = w.starts[n + 1];
        float sums[4] = {};
        for (; at + 8 <= end; at += 8) {
            _mm_prefetch(reinterpret_cast<const char*>(values + at) + 1024, _MM_HINT_T0);
            _mm_prefetch(reinterpret_cast<const char*>(w.indices + at) + 1024, _MM_HINT_T0);
            alignas(32) float v[8];
            _mm256_store_ps(v, load8(values + at));
#pragma GCC unroll 8
            for (int i = 0; i < 8; ++i) sums[i % 4] += v[i] * x[w.indices[at + i]];
        }
        for (; at < end; ++at) sums[0] += number(values[at]) * x[w.indices[at]];
        store(out, token, n, (sums[0] + sums[1]) + (sums[2] + sums[3]));
    }
}

template <typename V, int T>
void dense_rows(const Dense& w, const float* x, int64_t token, const Output& out, int64_t first, int64_t last) {
    constexpr int CHUNKS = sizeof(V) == 4 ? 2 : 4, LANES = T == 1 ? 2 : 1;
    const int64_t K = w.columns;
    const auto* p = static_cast<const V*>(w.values) + first * ROWS * K;
    x += token * K;
    for (int64_t g = first; g < last; ++g) {
        __m256 sums[ROWS][T][LANES];
        for (auto& row : sums)
            for (auto& one : row)
                for (auto& sum : one) sum = _mm256_setzero_ps();
        for (int64_t j = 0; j < K; j += 8 * CHUNKS) {
#pragma GCC unroll 4
            for (int r = 0; r < ROWS; ++r) {
                _mm_prefetch(reinterpret_cast<const char*>(p) + AHEAD, _MM_HINT_T0);
#pragma GCC unroll 4
                for (int h = 0; h < CHUNKS; ++h, p += 8) {
                    const __m256 v = load8(p);
#pragma GCC unroll 8
                    for (int t = 0; t < T; ++t)
                        sums[r][t][h % LANES] =
                            _mm256_fmadd_ps(v, _mm256_loadu_ps(x + t * K + j + 8 * h), sums[r][t][h % LANES]);
                }
            }
        }
        for (int r = 0; r < ROWS; ++r)
            for (int t = 0; t < T; ++t) {
                __m256 sum = sums[r][t][0];
                if (LANES == 2) sum = _mm256_add_ps(sum, sums[r][t][LANES - 1]);
                store(out, token + t, g * ROWS + r, sum_of(sum));
            }
    }
}

template <typename V>
void dense_tokens(const Dense& w, const float* x, int64_t tokens, const Output& out, int64_t first, int64_t last) {
    int64_t t = 0;
    for (; t + 2 < tokens; t += 3) dense_rows<V, 3>(w, x, t, out, first, last);
    if (tokens - t == 2) dense_rows<V, 2>(w, x, t, out, first, last);
    if (tokens - t == 1) dense_rows<V, 1>(w, x, t, out, first, last);
}

void dense(const Dense& w, const float* x, int64_t tokens, const Output& out, int64_t first, int64_t last) {
    if (w.type == F32) dense_tokens<float>(w, x, tokens, out, first, last);
    else dense_tokens<uint16_t>(w, x, tokens, out, first, last);
}

void indexed(const Indexed& w, const float* x, int64_t tokens, const Output& out, int64_t first, int64_t last) {
    for (int64_t t = 0; t < tokens; ++t) {
        if (w.type == F32) one_token<float>(w, x, t, out, first, last);
        else one_token<uint16_t>(w, x, t, out, first, last);
    }
}

}  // namespace

const Kernels* avx2() {
    using namespace avx2_batch;
    static const Kernels kernels{"avx2", bitmask, indexed, dense, PANEL, to_panel, plan, planned};
    return &kernels;
}

}  // namespace secateur
#else
#include "kernels.h"
const secateur::Kernels* secateur::avx2() { return nullptr; }
#endif
