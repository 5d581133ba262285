// Any processor: only the kept weights are visited.
#include "kernels.h"
#include "portable_batch.h"

namespace secateur {
namespace {

float value_at(const void* values, int32_t type, int64_t at) {
    if (type == F32) return static_cast<const float*>(values)[at];
    if (type == BF16) return widen(static_cast<const uint16_t*>(values)[at]);
    return static_cast<const int8_t*>(values)[at];
}

void bitmask(const Bitmask& w, const void* input, int64_t tokens, const Output& out, int64_t first, int64_t last) {
    const auto* x = static_cast<const float*>(input);
    const int step = step_of(w.type);
    const int64_t steps = w.columns / step, scales = w.type == INT8 ? w.columns / w.group : 0;
    for (int64_t g = first; g < last; ++g) {
        for (int64_t t = 0; t < tokens; ++t) {
            float sums[ROWS] = {};
            int64_t at = w.starts[g];
            const uint8_t* mask = w.mask + g * ROWS * w.columns / 8;
            for (int64_t j = 0; j < steps; ++j) {
                for (int r = 0; r < ROWS; ++r, mask += step / 8) {
                    uint64_t word = 0;
                    for (int b = 0; b < step / 8; ++b) word |= static_cast<uint64_t>(mask[b]) << (8 * b);
                    float sum = 0;
                    for (; word; word &= word - 1)
                        sum += value_at(w.values, w.type, at++) * x[t * w.columns + j * step + lowest(word)];
                    if (scales) sum *= widen(w.scales[(g * ROWS + r) * scales + j * step / w.group]);
                    sums[r] += sum;
                }
            }
            for (int r = 0; r < ROWS; ++r) store(out, t, g * ROWS + r, sums[r]);
        }
    }
}

void indexed(const Indexed& w, const void* input, int64_t tokens, const Output& out, int64_t first, int64_t last) {
    const auto* x = static_cast<const float*>(input);
    for (int64_t n = first; n < last; ++n) {
        for (int64_t t = 0; t < tokens; ++t) {
            float sum = 0;
            for (int64_t at = w.starts[n]; at < w.starts[n + 1]; ++at)
                sum += value_at(w.values, w.type, at) * x[t * w.columns + w.indices[at]];
            store(out, t, n, sum);
        }
    }
}

void blocks(const Blocks& w, const void* input, int64_t tokens, const Output& out, int64_t first, int64_t last) {
    const auto* x = static_cast<const float*>(input);
    for (int64_t g = first; g < last; ++g) {
        for (int64_t t = 0; t < tokens; ++t) {
            float sums[BLOCK_ROWS] = {};
            for (int64_t i = w.starts[g]; i < w.starts[g + 1]; ++i)
                for (int r = 0; r < BLOCK_ROWS; ++r)
                    sums[r] += value_at(w.values, w.type, i * BLOCK_ROWS + r) * x[t * w.columns + w.indices[i]];
            for (int r = 0; r < BLOCK_ROWS; ++r) store(out, t, g * BLOCK_ROWS + r, sums[r]);
        }
    }
}

void dense(const Dense& w, const void* input, int64_t tokens, const Output& out, int64_t first, int64_t last) {
    const auto* x = static_cast<const float*>(input);
    const int step = step_of(w.type);
    for (int64_t g = first; g < last; ++g) {
        for (int64_t t = 0; t < tokens; ++t) {
            float sums[ROWS] = {};
            int64_t at = g * ROWS * w.columns;
            for (int64_t j = 0; j < w.columns; j += step)
                for (int r = 0; r < ROWS; ++r)
                    for (int b = 0; b < step; ++b) sums[r] += value_at(w.values, w.type, at++) * x[t * w.columns + j + b];
            for (int r = 0; r < ROWS; ++r) store(out, t, g * ROWS + r, sums[r]);
        }
    }
}

}  // namespace

const Kernels* portable() {
    using namespace portable_batch;
    static const Kernels kernels{"portable", in_order, bitmask, indexed, blocks, dense, PANEL, to_panel, nullptr, planned, false};
    return &kernels;
}

}  // namespace secateur
