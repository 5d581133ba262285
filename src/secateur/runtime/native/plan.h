// Plans of weights in any format: how large their parts are, and what is in them. A block of a chunk is read into a
// table of what is kept, from which the lists are written.
#pragma once
#include <cstring>

#include "kernels.h"

namespace secateur {

inline int64_t chunks_of(int64_t rows) { return (rows + CHUNK - 1) / CHUNK; }
inline int64_t blocks_of(int64_t columns) { return (columns + BLOCK - 1) / BLOCK; }

// What the values of a plan are. A block of pairs covers twice as many columns.
struct Floats {
    using value = float;
    static constexpr int PER_ENTRY = 1;
};
struct Bfloats {
    using value = uint16_t;
    static constexpr int PER_ENTRY = 1;
};
struct Pairs {
    using value = uint32_t;
    static constexpr int PER_ENTRY = 2;
};

// Columns of a plan for a weight of so many, in entries.
template <class Kind>
int64_t entries_of(int64_t columns) {
    return (columns + 63) / 64 * 64 / Kind::PER_ENTRY;
}

inline int count_bits(uint64_t word) {
    word -= (word >> 1) & 0x5555555555555555u;
    word = (word & 0x3333333333333333u) + ((word >> 2) & 0x3333333333333333u);
    return static_cast<int>(((word + (word >> 4)) & 0x0f0f0f0f0f0f0f0fu) * 0x0101010101010101u >> 56);
}

// Bits 0, 2, 4, ... next to each other.
inline uint64_t even_bits(uint64_t word) {
    word &= 0x5555555555555555u;
    word = (word | word >> 1) & 0x3333333333333333u;
    word = (word | word >> 2) & 0x0f0f0f0f0f0f0f0fu;
    word = (word | word >> 4) & 0x00ff00ff00ff00ffu;
    word = (word | word >> 8) & 0x0000ffff0000ffffu;
    return (word | word >> 16) & 0xffffffffu;
}

// One block of a chunk: which entries of each row are kept, and those entries.
template <class Kind>
struct Block {
    uint64_t kept[CHUNK][BLOCK / 64];
    typename Kind::value values[CHUNK][BLOCK];

    // `column` is counted from the first of the block.
    void mark(int64_t row, int64_t column) {
        const int64_t entry = column / Kind::PER_ENTRY;
        kept[row][entry / 64] |= uint64_t{1} << (entry % 64);
    }
    // The mask of some columns, at most 64, from `column` on.
    void mark(int64_t row, int64_t column, uint64_t word) {
        if (Kind::PER_ENTRY == 2) word = even_bits(word | word >> 1);
        const int64_t entry = column / Kind::PER_ENTRY;
        kept[row][entry / 64] |= word << (entry % 64);
    }
    // In columns that rise: the second of a pair joins the first.
    void put(int64_t row, int64_t column, typename Kind::value value) {
        auto& to = values[row][column / Kind::PER_ENTRY];
        if constexpr (Kind::PER_ENTRY == 1) to = value;
        else {
            const int64_t entry = column / Kind::PER_ENTRY;
            const bool there = kept[row][entry / 64] >> (entry % 64) & 1;
            to = (there ? to : 0) | value << (column % 2 * 16);
        }
        mark(row, column);
    }
    void clear() { std::memset(kept, 0, sizeof(kept)); }
};

// Reads the blocks of one chunk in turn: `marks` says only what is kept, `read` the values too.
class BitmaskReader {
    const Bitmask& w;
    int64_t chunk, groups, at[CHUNK / ROWS];

    // each(row, column, word, group) for the words of a block of `width` columns.
    template <class Each>
    void words(int64_t from, int64_t width, const Each& each) const {
        const int64_t step = step_of(w.type), end = least(w.columns, from + width);
        for (int64_t i = 0; i < groups; ++i) {
            const int64_t g = chunk * CHUNK / ROWS + i;
            const uint8_t* mask = w.mask + (g * w.columns + from) / 8 * ROWS;
            for (int64_t j = from; j < end; j += step)
                for (int r = 0; r < ROWS; ++r, mask += step / 8) {
                    uint64_t word = 0;
                    std::memcpy(&word, mask, static_cast<size_t>(step / 8));
                    each(i * ROWS + r, j, word, i);
                }
        }
    }

    float scale(int64_t row, int64_t column) const {
        return widen(w.scales[(chunk * CHUNK + row) * (w.columns / w.group) + column / w.group]);
    }

public:
    BitmaskReader(const Bitmask& weight, int64_t which) : w(weight), chunk(which) {
        groups = least(CHUNK / ROWS, (w.rows + ROWS - 1) / ROWS - chunk * CHUNK / ROWS);
        for (int64_t i = 0; i < groups; ++i) at[i] = w.starts[chunk * CHUNK / ROWS + i];
    }

    template <class Kind>
    void marks(int64_t b, Block<Kind>& block) {
        block.clear();
        const int64_t width = BLOCK * Kind::PER_ENTRY, from = b * width;
        words(from, width, [&](int64_t row, int64_t j, uint64_t word, int64_t) { block.mark(row, j - from, word); });
    }

    template <class Kind>
    void read(int64_t b, Block<Kind>& block) {
        using V = typename Kind::value;
        block.clear();
        const int64_t width = BLOCK * Kind::PER_ENTRY, from = b * width;
        words(from, width, [&](int64_t row, int64_t j, uint64_t word, int64_t i) {
            const float level = w.type == INT8 ? scale(row, j) : 1.0f;
            for (; word; word &= word - 1) {
                const int64_t column = j - from + lowest(word), k = at[i]++;
                if (w.type == F32) block.put(row, column, static_cast<V>(static_cast<const float*>(w.values)[k]));
                if (w.type == BF16) block.put(row, column, static_cast<V>(static_cast<const uint16_t*>(w.values)[k]));
                if (w.type == INT8)
                    block.put(row, column,
                              static_cast<V>(static_cast<float>(static_cast<const int8_t*>(w.values)[k]) * level));
            }
        });
    }
};

// Of weights that say the column of each entry: `Own` has each(row, column, k) for the entries of some columns.
template <class Own, class Weight>
class EntriesReader {
protected:
    const Weight& w;

    explicit EntriesReader(const Weight& weight) : w(weight) {}

public:
    template <class Kind>
    void marks(int64_t b, Block<Kind>& block) {
        block.clear();
        const int64_t width = BLOCK * Kind::PER_ENTRY;
        static_cast<Own*>(this)->entries(
            b * width, width, [&](int64_t row, int64_t column, int64_t) { block.mark(row, column); });
    }

    template <class Kind>
    void read(int64_t b, Block<Kind>& block) {
        using V = typename Kind::value;
        block.clear();
        const int64_t width = BLOCK * Kind::PER_ENTRY;
        static_cast<Own*>(this)->entries(b * width, width, [&](int64_t row, int64_t column, int64_t k) {
            if (w.type == F32) block.put(row, column, static_cast<V>(static_cast<const float*>(w.values)[k]));
            else block.put(row, column, static_cast<V>(static_cast<const uint16_t*>(w.values)[k]));
        });
    }
};

class IndexedReader : public EntriesReader<IndexedReader, Indexed> {
    int64_t rows, at[CHUNK], last[CHUNK];

public:
    IndexedReader(const Indexed& weight, int64_t chunk) : EntriesReader(weight) {
        rows = least(CHUNK, w.rows - chunk * CHUNK);
        for (int64_t r = 0; r < rows; ++r) at[r] = w.starts[chunk * CHUNK + r], last[r] = w.starts[chunk * CHUNK + r + 1];
    }

    template <class Each>
    void entries(int64_t from, int64_t width, const Each& each) {
        for (int64_t r = 0; r < rows; ++r)
            for (; at[r] < last[r] && w.indices[at[r]] < from + width; ++at[r]) each(r, w.indices[at[r]] - from, at[r]);
    }
};

class BlocksReader : public EntriesReader<BlocksReader, Blocks> {
    static constexpr int64_t GROUPS = CHUNK / BLOCK_ROWS;
    int64_t groups, rows, at[GROUPS], last[GROUPS];

public:
    BlocksReader(const Blocks& weight, int64_t chunk) : EntriesReader(weight) {
        rows = least(CHUNK, w.rows - chunk * CHUNK);
        groups = (rows + BLOCK_ROWS - 1) / BLOCK_ROWS;
        for (int64_t g = 0; g < groups; ++g)
            at[g] = w.starts[chunk * GROUPS + g], last[g] = w.starts[chunk * GROUPS + g + 1];
    }

    template <class Each>
    void entries(int64_t from, int64_t width, const Each& each) {
        for (int64_t g = 0; g < groups; ++g)
            for (; at[g] < last[g] && w.indices[at[g]] < from + width; ++at[g])
                for (int64_t r = 0; r < least(BLOCK_ROWS, rows - g * BLOCK_ROWS); ++r)
                    each(g * BLOCK_ROWS + r, w.indices[at[g]] - from, at[g] * BLOCK_ROWS + r);
    }
};

inline BitmaskReader reader(const Bitmask& w, int64_t chunk) { return {w, chunk}; }
inline IndexedReader reader(const Indexed& w, int64_t chunk) { return {w, chunk}; }
inline BlocksReader reader(const Blocks& w, int64_t chunk) { return {w, chunk}; }

// The lists of one block.
template <class Kind>
void write_lists(const Block<Kind>& block, uint8_t* counts, uint8_t*& places, typename Kind::value*& values) {
    for (int p = 0; p < CHUNK / 2; ++p, counts += 3) {
        const auto *a = block.kept[2 * p], *b = block.kept[2 * p + 1];
        for (int list = 0; list < 3; ++list) {
            int count = 0;
            for (int i = 0; i < BLOCK / 64; ++i) {
                uint64_t word = list == 0 ? a[i] & b[i] : list == 1 ? a[i] & ~b[i] : b[i] & ~a[i];
                count += count_bits(word);
                for (; word; word &= word - 1) {
                    const int entry = 64 * i + lowest(word);
                    *places++ = static_cast<uint8_t>(entry);
                    if (list < 2) *values++ = block.values[2 * p][entry];
                    if (list != 1) *values++ = block.values[2 * p + 1][entry];
                }
            }
            counts[list] = static_cast<uint8_t>(count);
        }
    }
}

// Writes chunk `chunk` of the weight as chunk `slot` of a plan.
template <class Kind, class Weight>
void fill_chunk(const Weight& w, int64_t chunk, int64_t slot, const int64_t* offsets, uint8_t* counts, uint8_t* places,
                void* values) {
    static thread_local Block<Kind> block;
    const int64_t blocks = blocks_of(entries_of<Kind>(w.columns));
    auto from = reader(w, chunk);
    for (int64_t b = 0; b < blocks; ++b) {
        const int64_t at = slot * blocks + b;
        uint8_t* place = places + offsets[2 * at];
        auto* value = static_cast<typename Kind::value*>(values) + offsets[2 * at + 1];
        from.read(b, block);
        write_lists(block, counts + at * CHUNK / 2 * 3, place, value);
    }
}

// offsets[chunks * blocks + 1, 2] of `chunks` chunks from `first` on.
template <class Kind, class Weight>
void offsets_of(const Weight& w, int64_t first, int64_t chunks, int64_t* offsets) {
    static thread_local Block<Kind> block;
    const int64_t blocks = blocks_of(entries_of<Kind>(w.columns));
    offsets[0] = offsets[1] = 0;
    for (int64_t c = 0; c < chunks; ++c) {
        auto from = reader(w, first + c);
        for (int64_t b = 0; b < blocks; ++b, offsets += 2) {
            from.marks(b, block);
            offsets[2] = offsets[0], offsets[3] = offsets[1];
            for (int r = 0; r < CHUNK; r += 2)
                for (int i = 0; i < BLOCK / 64; ++i) {
                    const uint64_t a = block.kept[r][i], b2 = block.kept[r + 1][i];
                    offsets[2] += count_bits(a | b2);
                    offsets[3] += count_bits(a) + count_bits(b2);
                }
        }
    }
}

}  // namespace secateur
