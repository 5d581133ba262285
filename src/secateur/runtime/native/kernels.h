// What the kernels of all instruction sets share: layouts of the packed weights, and the table of functions.
//
// Shape letters: N rows of a weight, K its columns padded to a multiple of 64, T tokens.
#pragma once
#include <cstdint>
#include <cstring>

namespace secateur {

constexpr int ROWS = 4;  // rows of a group, whose weights form one stream

// PAIRS: two neighbouring columns of bfloat16 in 32 bits.
enum Type : int32_t { F32 = 0, BF16 = 1, INT8 = 2, PAIRS = 3 };

// Bitmask and kept values of W[N, K], in the order in which the kernels read them: for each group of four
// rows, for each step of 16 (f32), 32 (bf16) or 64 (int8) columns, for each of the four rows, one word whose
// bit b says whether column b of the step is kept; and the kept values in the same order. Values are
// readable for 64 bytes past the last.
struct Bitmask {
    int64_t rows, columns;  // columns padded
    const uint8_t* mask;
    const void* values;
    const int64_t* starts;  // [N / 4 + 1], of each group, in values
    const uint16_t* scales;  // bfloat16 [N padded, K / group]; int8 only
    int64_t group;           // columns that share a scale, a multiple of 64
    int32_t type;
};

// Column index and value of each kept weight, row after row.
struct Indexed {
    int64_t rows, columns;
    const uint16_t* indices;
    const void* values;
    const int64_t* starts;  // [N + 1]
    int32_t type;
};

// Column and values of each kept block of sixteen rows, sixteen rows after sixteen rows.
struct Blocks {
    int64_t rows, columns;
    const uint16_t* indices;
    const void* values;
    const int64_t* starts;  // [ceil(N / 16) + 1], in blocks
    int32_t type;
};

constexpr int BLOCK_ROWS = 16;

// For many tokens, from the bitmask: rows in chunks of 64, columns in blocks of 128. For each chunk, for each block,
// for each two rows of the chunk there are three lists: columns that both rows keep, that only the first keeps, and
// only the second. `counts` has the lengths of the three, `places` the columns within the block, `values` the
// values, those of the first list in turn for both rows. In a plan of PAIRS everything is said of pairs of columns.
struct Plan {
    int64_t rows, columns;  // columns padded, or pairs of them
    const uint8_t* counts;   // [chunks, blocks, 32, 3]
    const uint8_t* places;
    const void* values;
    const int64_t* offsets;  // [chunks * blocks + 1, 2], in places and values
    int32_t type;            // F32, BF16 or PAIRS
};

constexpr int CHUNK = 64, BLOCK = 128;

// All of W[N, K], in the order of the bitmask: what a dense matrix costs when it is streamed as well.
struct Dense {
    int64_t rows, columns;
    const void* values;
    int32_t type;  // F32 or BF16
};

// Where results go: y[t, n] (+ bias[n]), as float32 or bfloat16.
struct Output {
    void* y;
    int64_t stride;  // entries from one token to the next
    const float* bias;
    int64_t rows;
    int32_t type;
};

static inline float widen(uint16_t value) {
    uint32_t bits = static_cast<uint32_t>(value) << 16;
    float wide;
    std::memcpy(&wide, &bits, 4);
    return wide;
}

// Static, not inline: each file compiles its own with its own instructions.
// To nearest, ties to even; a NaN stays one.
static inline uint16_t narrow(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((bits >> 16) | 0x40u);
    return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

static inline void store(const Output& out, int64_t token, int64_t row, float sum) {
    if (row >= out.rows) return;
    if (out.bias) sum += out.bias[row];
    const int64_t at = token * out.stride + row;
    if (out.type == F32) static_cast<float*>(out.y)[at] = sum;
    else static_cast<uint16_t*>(out.y)[at] = narrow(sum);
}

// The lowest bit that is set.
static inline int lowest(uint64_t word) {
#if defined(__GNUC__)
    return __builtin_ctzll(word);
#else
    int bit = 0;
    while (!(word & 1)) word >>= 1, ++bit;
    return bit;
#endif
}

static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

static inline int step_of(int32_t type) { return type == F32 ? 16 : type == BF16 ? 32 : 64; }

// How a streaming kernel takes x[T, K], whose padded columns are zeros: as bfloat16, as float32, or as float32 where
// the columns of a step are dealt out to so many vectors (the first has columns 0, n, 2n, ...).
enum Input : int32_t { AS_BF16 = 0, IN_ORDER = 1, DEALT_2 = 2, DEALT_4 = 4 };

// One instruction set.
//
// The streaming kernels do rows (groups of rows where the weight has groups) first to last; `input` says what x they
// take for a weight and an x of these types (`indexed` and `blocks` always take IN_ORDER). Plans are multiplied with x in panels
// of `panel` tokens, [ceil(T / panel), K, panel], as `to_panel` writes one; a kernel does chunks first to last, and
// sums in [ceil(T / panel), rows, panel], which it clears.
struct Kernels {
    const char* name;
    Input (*input)(int32_t weight, int32_t x);
    void (*bitmask)(const Bitmask&, const void* x, int64_t tokens, const Output&, int64_t first, int64_t last);
    void (*indexed)(const Indexed&, const void* x, int64_t tokens, const Output&, int64_t first, int64_t last);
    void (*blocks)(const Blocks&, const void* x, int64_t tokens, const Output&, int64_t first, int64_t last);
    void (*dense)(const Dense&, const void* x, int64_t tokens, const Output&, int64_t first, int64_t last);
    int64_t panel;
    // From x[T, width] of this type; PAIRS: bfloat16, of which two columns are one entry of the panel.
    void (*to_panel)(const void* x, int32_t type, int64_t tokens, int64_t width, int64_t columns, float* panel);
    // Writes chunk `chunk` of a bitmask as chunk `slot` of a plan whose offsets are known; null where nothing is faster
    // than what is there for all weights.
    void (*plan)(const Bitmask&, int64_t chunk, int64_t slot, const int64_t* offsets, uint8_t* counts, uint8_t* places,
                 void* values);
    void (*planned)(const Plan&, const float* panels, int64_t tokens, const Output&, int64_t first, int64_t last,
                    float* sums);
    bool pairs;  // whether `planned` takes PAIRS
};

static inline Input in_order(int32_t, int32_t) { return IN_ORDER; }

// Null where the file was built for another processor.
const Kernels* portable();
const Kernels* avx2();
const Kernels* avx512f();
const Kernels* avx512vbmi2();
const Kernels* avx512bf16();
const Kernels* neon();

}  // namespace secateur
