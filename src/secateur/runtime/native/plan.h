// Plans of weights in any format: how large their parts are, and what is in them.
//
// For each format: `size_chunk` counts places and values of each block of a chunk, `fill_chunk` writes chunk `chunk`
// of the weight as chunk `slot` of a plan.
#pragma once
#include <cstring>

#include "kernels.h"

namespace secateur {

inline int64_t chunks_of(int64_t rows) { return (rows + CHUNK - 1) / CHUNK; }
inline int64_t blocks_of(int64_t columns) { return (columns + BLOCK - 1) / BLOCK; }

inline int count_bits(uint64_t word) {
    word -= (word >> 1) & 0x5555555555555555u;
    word = (word & 0x3333333333333333u) + ((word >> 2) & 0x3333333333333333u);
    return static_cast<int>(((word + (word >> 4)) & 0x0f0f0f0f0f0f0f0fu) * 0x0101010101010101u >> 56);
}

inline void size_chunk(const Bitmask& w, int64_t chunk, int64_t* sizes) {
    const int64_t step = step_of(w.type) / 8, K = w.columns, blocks = blocks_of(K);
    const int64_t groups = (w.rows + ROWS - 1) / ROWS, last = least(groups, (chunk + 1) * CHUNK / ROWS);
    std::memset(sizes, 0, static_cast<size_t>(2 * blocks) * sizeof(int64_t));
    for (int64_t g = chunk * CHUNK / ROWS; g < last; ++g)
        for (int64_t j = 0; j < K / 8; j += step) {
            const uint8_t* words = w.mask + (g * K / 8 + j) * ROWS;
            int64_t* size = sizes + j / (BLOCK / 8) * 2;
            for (int i = 0; i < ROWS; i += 2) {
                uint64_t a = 0, b = 0;
                std::memcpy(&a, words + i * step, static_cast<size_t>(step));
                std::memcpy(&b, words + (i + 1) * step, static_cast<size_t>(step));
                size[0] += count_bits(a | b);
                size[1] += count_bits(a) + count_bits(b);
            }
        }
}

inline void fill_chunk(const Kernels& isa, const Bitmask& w, int64_t chunk, int64_t slot, const int64_t* offsets,
                       uint8_t* counts, uint8_t* places, void* values) {
    isa.plan(w, chunk, slot, offsets, counts, places, values);
}

// Calls block(b) before the pairs of block b, then pair(p, begin, end) with the entries of the block in both rows of
// pair p: [begin[r], end[r]), empty for a row past the last.
template <class Block, class Pair>
void for_pairs(const Indexed& w, int64_t chunk, const Block& block, const Pair& pair) {
    const int64_t rows = least(CHUNK, w.rows - chunk * CHUNK);
    int64_t at[CHUNK + 1], last[CHUNK + 1];
    for (int64_t r = 0; r <= rows; ++r) {
        const bool is = r < rows;
        at[r] = is ? w.starts[chunk * CHUNK + r] : 0;
        last[r] = is ? w.starts[chunk * CHUNK + r + 1] : 0;
    }
    for (int64_t b = 0; b < blocks_of(w.columns); ++b) {
        block(b);
        for (int64_t r = 0; r < rows; r += 2) {
            int64_t begin[2] = {at[r], at[r + 1]};
            for (int i = 0; i < 2; ++i)
                while (at[r + i] < last[r + i] && w.indices[at[r + i]] < (b + 1) * BLOCK) ++at[r + i];
            const int64_t end[2] = {at[r], at[r + 1]};
            pair(r / 2, begin, end);
        }
    }
}

// both(i, j), first(i) and second(j) for the entries of two rows, by rising columns.
template <class Both, class First, class Second>
void merge(const uint16_t* columns, const int64_t* begin, const int64_t* end, const Both& both, const First& first,
           const Second& second) {
    int64_t i = begin[0], j = begin[1];
    while (i < end[0] && j < end[1]) {
        if (columns[i] == columns[j]) both(i++, j++);
        else if (columns[i] < columns[j]) first(i++);
        else second(j++);
    }
    while (i < end[0]) first(i++);
    while (j < end[1]) second(j++);
}

inline void size_chunk(const Indexed& w, int64_t chunk, int64_t* sizes) {
    int64_t* size = sizes - 2;
    for_pairs(
        w, chunk,
        [&](int64_t) {
            size += 2;
            size[0] = size[1] = 0;
        },
        [&](int64_t, const int64_t* begin, const int64_t* end) {
            const int64_t entries = end[0] - begin[0] + end[1] - begin[1];
            int64_t shared = 0;
            merge(w.indices, begin, end, [&](int64_t, int64_t) { ++shared; }, [](int64_t) {}, [](int64_t) {});
            size[0] += entries - shared;
            size[1] += entries;
        });
}

template <typename V>
void fill_indexed(const Indexed& w, int64_t chunk, int64_t slot, const int64_t* offsets, uint8_t* counts,
                  uint8_t* places, V* values) {
    const int64_t blocks = blocks_of(w.columns);
    const V* from = static_cast<const V*>(w.values);
    uint8_t *count = nullptr, *place = nullptr;
    V* value = nullptr;
    int64_t start = 0;
    for_pairs(
        w, chunk,
        [&](int64_t b) {
            const int64_t at = slot * blocks + b;
            count = counts + at * CHUNK / 2 * 3;
            place = places + offsets[2 * at];
            value = values + offsets[2 * at + 1];
            start = b * BLOCK;
            std::memset(count, 0, CHUNK / 2 * 3);
        },
        [&](int64_t p, const int64_t* begin, const int64_t* end) {
            uint8_t alone[2][BLOCK];
            V single[2][BLOCK];
            int n = 0, m[2] = {0, 0};
            const auto one = [&](int row) {
                return [&, row](int64_t i) {
                    alone[row][m[row]] = static_cast<uint8_t>(w.indices[i] - start);
                    single[row][m[row]++] = from[i];
                };
            };
            const auto two = [&](int64_t i, int64_t j) {
                place[n++] = static_cast<uint8_t>(w.indices[i] - start);
                *value++ = from[i];
                *value++ = from[j];
            };
            merge(w.indices, begin, end, two, one(0), one(1));
            count[3 * p] = static_cast<uint8_t>(n);
            place += n;
            for (int row = 0; row < 2; ++row) {
                count[3 * p + 1 + row] = static_cast<uint8_t>(m[row]);
                for (int i = 0; i < m[row]; ++i) *place++ = alone[row][i], *value++ = single[row][i];
            }
        });
}

inline void fill_chunk(const Kernels&, const Indexed& w, int64_t chunk, int64_t slot, const int64_t* offsets,
                       uint8_t* counts, uint8_t* places, void* values) {
    if (w.type == F32) fill_indexed(w, chunk, slot, offsets, counts, places, static_cast<float*>(values));
    else fill_indexed(w, chunk, slot, offsets, counts, places, static_cast<uint16_t*>(values));
}

// offsets[chunks * blocks + 1, 2] of `chunks` chunks from `first` on.
template <class Weight>
void offsets_of(const Weight& w, int64_t first, int64_t chunks, int64_t* offsets) {
    const int64_t blocks = blocks_of(w.columns);
    offsets[0] = offsets[1] = 0;
    for (int64_t c = 0; c < chunks; ++c) size_chunk(w, first + c, offsets + 2 * (c * blocks + 1));
    for (int64_t i = 2; i < 2 * (chunks * blocks + 1); ++i) offsets[i] += offsets[i - 2];
}

}  // namespace secateur
