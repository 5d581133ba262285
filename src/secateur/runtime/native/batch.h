// Plans times panels of x, for many tokens: tokens are what a vector holds. The same for every instruction set; what
// differs comes as B: LANES and VECTORS of a panel, TOKENS, Vec, zero, add, load, store, `once` (keeps a load from
// being done twice), `spread` (a value in all lanes), `spread_two`, and `multiplied<type>(values, x, sum)`.
#pragma once
#include "kernels.h"

namespace secateur {
namespace {

// A value of a plan of PAIRS.
enum class Pair : uint32_t {};

// sums[.][n] += values[i] * x[places[i]][n]
template <class B, typename V, int N, int SETS>
void add_list(const V* values, const uint8_t* places, int count, const float* x, typename B::Vec (&sums)[SETS][N]) {
    constexpr int LANES = B::LANES, PANEL = LANES * B::VECTORS;
    int i = 0;
    for (; i + SETS <= count; i += SETS)
#pragma GCC unroll 4
        for (int s = 0; s < SETS; ++s) {
            const auto value = B::spread(values + i + s);
            const float* column = x + places[i + s] * PANEL;
#pragma GCC unroll 8
            for (int n = 0; n < N; ++n)
                sums[s][n] = B::template multiplied<V>(value, B::load(column + LANES * n), sums[s][n]);
        }
    for (; SETS > 1 && i < count; ++i) {
        const auto value = B::spread(values + i);
        const float* column = x + places[i] * PANEL;
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n)
            sums[0][n] = B::template multiplied<V>(value, B::load(column + LANES * n), sums[0][n]);
    }
}

// y[r] += rows of one chunk and block times x, for N vectors of tokens. Meanwhile `next` comes into the second cache.
template <class B, typename V, int N>
void multiply(const uint8_t* counts, const uint8_t* places, const void* stream, int64_t pairs, const float* x, float* y,
              const float* next) {
    constexpr int SETS = N == 1 ? 4 : N <= 3 ? 2 : 1;  // sums of a row, to hide the latency of the FMA
    constexpr int LANES = B::LANES, PANEL = LANES * B::VECTORS, PART = BLOCK * PANEL / (CHUNK / 2);
    const auto* values = static_cast<const V*>(stream);
    for (int64_t p = 0; p < pairs; ++p, counts += 3, y += 2 * PANEL, next += PART) {
        for (int i = 0; i < PART; i += 16) __builtin_prefetch(next + i, 0, 2);
        typename B::Vec first[SETS][N], second[SETS][N];
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n) {
            first[0][n] = B::load(y + LANES * n);
            second[0][n] = B::load(y + PANEL + LANES * n);
#pragma GCC unroll 4
            for (int s = 1; s < SETS; ++s) first[s][n] = second[s][n] = B::zero();
        }
        for (int i = 0; i < counts[0]; ++i) {
            typename B::Vec a, b;
            B::spread_two(values + 2 * i, a, b);
            const float* column = x + places[i] * PANEL;
#pragma GCC unroll 8
            for (int n = 0; n < N; ++n) {
                const auto some = B::once(B::load(column + LANES * n));
                first[0][n] = B::template multiplied<V>(a, some, first[0][n]);
                second[0][n] = B::template multiplied<V>(b, some, second[0][n]);
            }
        }
        values += 2 * counts[0], places += counts[0];
        add_list<B, V, N, SETS>(values, places, counts[1], x, first);
        values += counts[1], places += counts[1];
        add_list<B, V, N, SETS>(values, places, counts[2], x, second);
        values += counts[2], places += counts[2];
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n) {
#pragma GCC unroll 4
            for (int s = 1; s < SETS; ++s) {
                first[0][n] = B::add(first[0][n], first[s][n]);
                second[0][n] = B::add(second[0][n], second[s][n]);
            }
            B::store(y + LANES * n, first[0][n]);
            B::store(y + PANEL + LANES * n, second[0][n]);
        }
    }
}

using Multiply = void (*)(const uint8_t*, const uint8_t*, const void*, int64_t, const float*, float*, const float*);

template <class B, typename V, int N>
Multiply of_vectors(int64_t vectors) {
    if constexpr (N < B::VECTORS)
        if (vectors > N) return of_vectors<B, V, N + 1>(vectors);
    return multiply<B, V, N>;
}

// The instructions that multiply two bfloat16 at a time are only there in some sets.
template <class B, bool PAIRED>
Multiply of_type(int32_t type, int64_t vectors) {
    if constexpr (PAIRED)
        if (type == PAIRS) return of_vectors<B, Pair, 1>(vectors);
    return type == F32 ? of_vectors<B, float, 1>(vectors) : of_vectors<B, uint16_t, 1>(vectors);
}

template <class B, bool PAIRED = false>
void planned_by(const Plan& w, const float* panels, int64_t tokens, const Output& out, int64_t first, int64_t last,
                float* sums) {
    constexpr int LANES = B::LANES, PANEL = LANES * B::VECTORS;
    const int64_t K = w.columns, blocks = (K + BLOCK - 1) / BLOCK, count = (tokens + PANEL - 1) / PANEL;
    const int64_t rows = (last - first) * CHUNK, size = w.type == BF16 ? 2 : 4;
    std::memset(sums, 0, static_cast<size_t>(count * rows * PANEL) * sizeof(float));
    for (int64_t b = 0; b < blocks; ++b)
        for (int64_t c = 0; c < count; ++c) {
            const int64_t vectors = (least(PANEL, tokens - c * PANEL) + LANES - 1) / LANES;
            const Multiply some = of_type<B, PAIRED>(w.type, vectors);
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

}  // namespace
}  // namespace secateur
