// Kernels for few tokens: weights are read once, from first to last. The same for every instruction set; what differs
// comes as V, one class a type of the values:
//
//   value, word, input   types of a kept value, of the mask of a step, and of x
//   STEP, VECTORS        columns of a step and the vectors that they fill
//   TOKENS               tokens that are done at once
//   SCALE                what int8 levels are to be multiplied with after `expand`
//   Vec, zero, add, fma(values, x, sum), scaled(sum, scale, total), sum, x(column, h)
//   Step<DENSE>(word)    next(p, h): the h-th vector of a step, whose values begin at p, which moves on
#pragma once
#include "kernels.h"

namespace secateur {
namespace {

constexpr int AHEAD = 4096;  // bytes of values that are fetched before they are needed

// Groups of rows [first, last) for T tokens from `token` on. Dense: all values are there, and there is no mask.
template <class V, int T, bool DENSE, class Weight>
void rows_of(const Weight& w, const typename V::input* x, int64_t token, const Output& out, int64_t first,
             int64_t last) {
    using Vec = typename V::Vec;
    using Step = typename V::template Step<DENSE>;
    constexpr int SUMS = T == 1 && V::VECTORS > 1 ? 2 : 1;  // two sums a row hide the latency of the FMA
    constexpr bool SCALED = V::STEP == 64;
    const int64_t K = w.columns, steps = K / V::STEP;
    int64_t per_scale = steps, scales = 0;
    const uint8_t* mask = nullptr;
    const auto* p = static_cast<const typename V::value*>(w.values);
    if constexpr (DENSE) p += first * ROWS * K;
    else {
        p += w.starts[first];
        mask = w.mask + first * ROWS * K / 8;
        if (SCALED) per_scale = w.group / V::STEP, scales = K / w.group;
    }
    x += token * K;
    for (int64_t g = first; g < last; ++g) {
        Vec total[ROWS][T], sums[ROWS][T][SUMS];
        for (int r = 0; r < ROWS; ++r)
            for (int t = 0; t < T; ++t) {
                total[r][t] = V::zero();
                for (int s = 0; s < SUMS; ++s) sums[r][t][s] = V::zero();
            }
        for (int64_t from = 0, s = 0; from < steps; from += per_scale, ++s) {
            for (int64_t j = from; j < from + per_scale; ++j) {
                const auto* column = x + j * V::STEP;
#pragma GCC unroll 4
                for (int r = 0; r < ROWS; ++r) {
                    if (DENSE || r % 2 == 0) __builtin_prefetch(reinterpret_cast<const char*>(p) + AHEAD);
                    typename V::word word = 0;
                    if (!DENSE) std::memcpy(&word, mask + r * (V::STEP / 8), sizeof(word));
                    Step step(word);
#pragma GCC unroll 16
                    for (int h = 0; h < V::VECTORS; ++h) {
                        const Vec v = step.next(p, h);
#pragma GCC unroll 8
                        for (int t = 0; t < T; ++t)
                            sums[r][t][h % SUMS] = V::fma(v, V::x(column + t * K, h), sums[r][t][h % SUMS]);
                    }
                }
                if (!DENSE) mask += ROWS * V::STEP / 8;
            }
            if constexpr (SCALED) {
#pragma GCC unroll 4
                for (int r = 0; r < ROWS; ++r) {
                    const float scale = widen(w.scales[(g * ROWS + r) * scales + s]) * V::SCALE;
#pragma GCC unroll 8
                    for (int t = 0; t < T; ++t) {
                        Vec part = sums[r][t][0];
                        if (SUMS == 2) part = V::add(part, sums[r][t][SUMS - 1]);
                        total[r][t] = V::scaled(part, scale, total[r][t]);
                        for (int i = 0; i < SUMS; ++i) sums[r][t][i] = V::zero();
                    }
                }
            }
        }
        for (int r = 0; r < ROWS; ++r)
            for (int t = 0; t < T; ++t) {
                Vec sum = SCALED ? total[r][t] : sums[r][t][0];
                if (!SCALED && SUMS == 2) sum = V::add(sum, sums[r][t][SUMS - 1]);
                store(out, token + t, g * ROWS + r, V::sum(sum));
            }
    }
}

template <class V, int T, bool DENSE, class Weight>
void tokens_of(const Weight& w, const typename V::input* x, int64_t tokens, const Output& out, int64_t first,
               int64_t last, int64_t token) {
    for (; token + T <= tokens; token += T) rows_of<V, T, DENSE>(w, x, token, out, first, last);
    if constexpr (T > 1)
        if (token < tokens) tokens_of<V, T - 1, DENSE>(w, x, tokens, out, first, last, token);
}

template <class V, bool DENSE, class Weight>
void streamed(const Weight& w, const void* x, int64_t tokens, const Output& out, int64_t first, int64_t last) {
    tokens_of<V, V::TOKENS, DENSE>(w, static_cast<const typename V::input*>(x), tokens, out, first, last, 0);
}

inline float number(float value) { return value; }
inline float number(uint16_t value) { return widen(value); }

// `Eight` widens eight values.
template <class Eight, typename V>
void indexed_rows(const Indexed& w, const float* x, int64_t tokens, const Output& out, int64_t first, int64_t last) {
    const auto* values = static_cast<const V*>(w.values);
    for (int64_t t = 0; t < tokens; ++t, x += w.columns)
        for (int64_t n = first; n < last; ++n) {
            int64_t at = w.starts[n];
            const int64_t end = w.starts[n + 1];
            float sums[4] = {};
            for (; at + 8 <= end; at += 8) {
                __builtin_prefetch(reinterpret_cast<const char*>(values + at) + 1024);
                __builtin_prefetch(reinterpret_cast<const char*>(w.indices + at) + 1024);
                alignas(32) float v[8];
                Eight::widened(values + at, v);
#pragma GCC unroll 8
                for (int i = 0; i < 8; ++i) sums[i % 4] += v[i] * x[w.indices[at + i]];
            }
            for (; at < end; ++at) sums[0] += number(values[at]) * x[w.indices[at]];
            store(out, t, n, (sums[0] + sums[1]) + (sums[2] + sums[3]));
        }
}

template <class Eight>
void indexed_of(const Indexed& w, const void* x, int64_t tokens, const Output& out, int64_t first, int64_t last) {
    const auto* wide = static_cast<const float*>(x);
    if (w.type == F32) indexed_rows<Eight, float>(w, wide, tokens, out, first, last);
    else indexed_rows<Eight, uint16_t>(w, wide, tokens, out, first, last);
}

// Groups of sixteen rows, whose sums are what vectors hold. Isa has LANES, load and all (a number in every lane).
template <class Isa, typename V, int T>
void block_rows(const Blocks& w, const float* x, int64_t token, const Output& out, int64_t first, int64_t last) {
    constexpr int N = BLOCK_ROWS / Isa::LANES, WANTED = 8 / (N * T), SETS = WANTED > 1 ? WANTED : 1;
    using Vec = typename Isa::Vec;
    const int64_t K = w.columns;
    const auto* values = static_cast<const V*>(w.values);
    x += token * K;
    for (int64_t g = first; g < last; ++g) {
        Vec sums[SETS][T][N];
        for (auto& set : sums)
            for (auto& one : set)
                for (auto& sum : one) sum = Isa::zero();
        int64_t at = w.starts[g];
        const int64_t end = w.starts[g + 1];
        const auto add = [&](int64_t i, Vec(&into)[T][N]) {
            const float* column = x + w.indices[i];
            Vec v[N];
#pragma GCC unroll 4
            for (int n = 0; n < N; ++n) v[n] = Isa::load(values + i * BLOCK_ROWS + n * Isa::LANES);
#pragma GCC unroll 8
            for (int t = 0; t < T; ++t) {
                const Vec number = Isa::all(column[t * K]);
#pragma GCC unroll 4
                for (int n = 0; n < N; ++n) into[t][n] = Isa::fma(v[n], number, into[t][n]);
            }
        };
        for (; at + SETS <= end; at += SETS) {
            __builtin_prefetch(reinterpret_cast<const char*>(values + at * BLOCK_ROWS) + AHEAD);
#pragma GCC unroll 8
            for (int s = 0; s < SETS; ++s) add(at + s, sums[s]);
        }
        for (; at < end; ++at) add(at, sums[0]);
        for (int t = 0; t < T; ++t)
            for (int n = 0; n < N; ++n) {
                for (int s = 1; s < SETS; ++s) sums[0][t][n] = Isa::add(sums[0][t][n], sums[s][t][n]);
                float lanes[Isa::LANES];
                std::memcpy(lanes, &sums[0][t][n], sizeof(lanes));
                for (int l = 0; l < Isa::LANES; ++l)
                    store(out, token + t, g * BLOCK_ROWS + n * Isa::LANES + l, lanes[l]);
            }
    }
}

template <class Isa, typename V, int T>
void block_tokens(const Blocks& w, const float* x, int64_t tokens, const Output& out, int64_t first, int64_t last,
                  int64_t token) {
    for (; token + T <= tokens; token += T) block_rows<Isa, V, T>(w, x, token, out, first, last);
    if constexpr (T > 1)
        if (token < tokens) block_tokens<Isa, V, T - 1>(w, x, tokens, out, first, last, token);
}

template <class Isa>
void blocks_of_rows(const Blocks& w, const void* x, int64_t tokens, const Output& out, int64_t first, int64_t last) {
    constexpr int T = 4;
    const auto* wide = static_cast<const float*>(x);
    if (w.type == F32) block_tokens<Isa, float, T>(w, wide, tokens, out, first, last, 0);
    else block_tokens<Isa, uint16_t, T>(w, wide, tokens, out, first, last, 0);
}

}  // namespace
}  // namespace secateur
