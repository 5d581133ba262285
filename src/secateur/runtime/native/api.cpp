// The library's C interface. Arguments are checked by the caller (`runtime/native.py`), once a weight.
#include <algorithm>
#include <vector>

#include "export.h"
#include "kernels.h"
#include "parallel.h"
#include "plan.h"

using namespace secateur;

namespace {

const Kernels* best() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_cpu_init();
    if (avx2() && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return avx2();
#endif
    return portable();
}

const Kernels*& chosen() {
    static const Kernels* kernels = best();
    return kernels;
}

// At least so many bytes, aligned to 64, that stay until the next call with the same buffer.
void* at_least(std::vector<char>& buffer, int64_t bytes) {
    if (static_cast<int64_t>(buffer.size()) < bytes + 64) buffer.resize(static_cast<size_t>(bytes) + 64);
    return reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(buffer.data()) + 63) / 64 * 64);
}

// x as float32 [tokens, columns] with zeros in columns from `width` on; x itself where it is that already.
const float* widened(const void* x, int32_t type, int64_t tokens, int64_t width, int64_t columns,
                     std::vector<char>& scratch) {
    if (type == F32 && width == columns) return static_cast<const float*>(x);
    auto* const wide = static_cast<float*>(at_least(scratch, tokens * columns * 4));
    for (int64_t t = 0; t < tokens; ++t) {
        float* to = wide + t * columns;
        if (type == F32) std::memcpy(to, static_cast<const float*>(x) + t * width, width * sizeof(float));
        else
            for (int64_t k = 0; k < width; ++k) to[k] = widen(static_cast<const uint16_t*>(x)[t * width + k]);
        std::memset(to + width, 0, (columns - width) * sizeof(float));
    }
    return wide;
}

template <class Weight, class Kernel>
void linear(const Weight& w, Kernel kernel, int64_t width, int64_t pieces, int64_t weights, const void* x,
            int64_t tokens, int32_t type, const float* bias, void* y, int32_t threads) {
    static thread_local std::vector<char> scratch;
    const float* wide = widened(x, type, tokens, width, w.columns, scratch);
    const Output out{y, w.rows, bias, w.rows, type};
    // Pieces that take some microseconds each, and at least four a thread where there are that many.
    const int64_t few = std::max<int64_t>(1, pieces * 8192 / std::max<int64_t>(1, weights));
    const int64_t piece = std::max<int64_t>(1, std::min(std::max<int64_t>(few, 16), pieces / (4 * threads)));
    const int team = weights * tokens < 16384 ? 1 : threads;  // waking a team costs more than it saves
    for_pieces(pieces, piece, team,
               [&](int64_t first, int64_t last) { kernel(w, wide, tokens, out, first, last); });
}

constexpr int64_t PANELS = 4;          // at a time: their sums stay in the second cache
constexpr int64_t CHUNKS_AT_ONCE = 4;  // that use a block of x while it is in the first
constexpr int64_t MOST = 2048;         // tokens that are written in panels at once

// y = x W' + bias, many tokens. `plan_of(first, last, plan)` sets the plan of these chunks, as its chunks 0, 1, ...
template <class PlanOf>
void many_tokens(int64_t rows, int64_t columns, int64_t width, const void* x, int64_t tokens, int32_t type,
                 const float* bias, void* y, int32_t threads, const PlanOf& plan_of) {
    const Kernels& isa = *chosen();
    const int64_t size = type == F32 ? 4 : 2, most = MOST / isa.panel * isa.panel;
    static thread_local std::vector<char> shared;
    for (int64_t from = 0; from < tokens; from += most) {
        const int64_t some = std::min(most, tokens - from), count = (some + isa.panel - 1) / isa.panel;
        const int64_t panel = columns * isa.panel;
        auto* const panels = static_cast<float*>(at_least(shared, count * panel * 4));
        for_pieces(count, 1, threads, [&](int64_t first, int64_t last) {
            for (int64_t c = first; c < last; ++c) {
                const int64_t token = c * isa.panel;
                isa.to_panel(static_cast<const char*>(x) + (from + token) * width * size, type,
                             std::min(isa.panel, some - token), width, columns, panels + c * panel);
            }
        });
        const int64_t chunks = chunks_of(rows);
        const int64_t piece = std::max<int64_t>(1, std::min(CHUNKS_AT_ONCE, chunks / threads));
        for_pieces(chunks, piece, threads, [&](int64_t first, int64_t last) {
            static thread_local std::vector<char> own;
            Plan plan;
            plan_of(first, last, plan);
            const int64_t row = first * CHUNK;
            for (int64_t c = 0; c < count; c += PANELS) {
                const int64_t token = c * isa.panel, few = std::min(PANELS * isa.panel, some - token);
                const int64_t bytes = std::min(PANELS, count - c) * (last - first) * CHUNK * isa.panel * 4;
                const Output out{static_cast<char*>(y) + ((from + token) * rows + row) * size, rows,
                                 bias ? bias + row : nullptr, rows - row, type};
                isa.planned(plan, panels + c * panel, few, out, 0, last - first,
                            static_cast<float*>(at_least(own, bytes)));
            }
        });
    }
}

template <class Weight>
void make_plan(const Weight& w, const int64_t* offsets, uint8_t* counts, uint8_t* places, void* values,
               int32_t threads) {
    for_pieces(chunks_of(w.rows), 1, threads, [&](int64_t first, int64_t last) {
        for (int64_t c = first; c < last; ++c) fill_chunk(*chosen(), w, c, c, offsets, counts, places, values);
    });
}

template <class Weight>
void expanded(const Weight& w, int64_t width, const void* x, int64_t tokens, int32_t type, const float* bias, void* y,
              int32_t threads) {
    const int64_t blocks = blocks_of(w.columns), columns = (w.columns + 63) / 64 * 64;
    const int32_t kind = w.type == BF16 ? BF16 : F32;
    many_tokens(w.rows, columns, width, x, tokens, type, bias, y, threads,
                [&](int64_t first, int64_t last, Plan& plan) {
                    static thread_local std::vector<char> memory[4];
                    const int64_t parts = (last - first) * blocks;
                    auto* offsets = static_cast<int64_t*>(at_least(memory[0], 16 * (parts + 1)));
                    offsets_of(w, first, last - first, offsets);
                    auto* counts = static_cast<uint8_t*>(at_least(memory[1], parts * CHUNK / 2 * 3));
                    auto* places = static_cast<uint8_t*>(at_least(memory[2], offsets[2 * parts]));
                    void* values = at_least(memory[3], offsets[2 * parts + 1] * (kind == F32 ? 4 : 2));
                    for (int64_t c = first; c < last; ++c)
                        fill_chunk(*chosen(), w, c, c - first, offsets, counts, places, values);
                    plan = {w.rows - first * CHUNK, columns, counts, places, values, offsets, kind};
                });
}

}  // namespace

// The version of this interface: Python refuses another.
SECATEUR_EXPORT int32_t secateur_version() { return 1; }

SECATEUR_EXPORT const char* secateur_kernels() { return chosen()->name; }

// Choose kernels by name, or the best for this processor by "". 0, or 1 where they are not to be had.
SECATEUR_EXPORT int32_t secateur_choose(const char* name) {
    const Kernels* found = nullptr;
    if (!*name || !std::strcmp(name, best()->name)) found = best();
    if (!std::strcmp(name, "portable")) found = portable();
    if (!found) return 1;
    chosen() = found;
    return 0;
}

// y[tokens, rows] = x[tokens, width] W' + bias, x and y both float32 or both bfloat16.
SECATEUR_EXPORT void secateur_bitmask_linear(const Bitmask* w, int64_t width, const void* x, int64_t tokens,
                                             int32_t type, const float* bias, void* y, int32_t threads) {
    const int64_t groups = (w->rows + ROWS - 1) / ROWS;
    linear(*w, chosen()->bitmask, width, groups, w->starts[groups], x, tokens, type, bias, y, threads);
}

SECATEUR_EXPORT void secateur_indexed_linear(const Indexed* w, int64_t width, const void* x, int64_t tokens,
                                             int32_t type, const float* bias, void* y, int32_t threads) {
    linear(*w, chosen()->indexed, width, w->rows, w->starts[w->rows], x, tokens, type, bias, y, threads);
}

SECATEUR_EXPORT void secateur_dense_linear(const Dense* w, int64_t width, const void* x, int64_t tokens, int32_t type,
                                           const float* bias, void* y, int32_t threads) {
    const int64_t groups = (w->rows + ROWS - 1) / ROWS;
    linear(*w, chosen()->dense, width, groups, w->rows * w->columns, x, tokens, type, bias, y, threads);
}

// Tokens of a panel, or 0 where the kernels have no batch form: then none of the following may be called.
SECATEUR_EXPORT int64_t secateur_panel() { return chosen()->panel; }

// Where the parts of a plan begin: offsets[chunks * blocks + 1, 2], in places and values.
SECATEUR_EXPORT void secateur_bitmask_offsets(const Bitmask* w, int64_t* offsets) {
    offsets_of(*w, 0, chunks_of(w->rows), offsets);
}

SECATEUR_EXPORT void secateur_indexed_offsets(const Indexed* w, int64_t* offsets) {
    offsets_of(*w, 0, chunks_of(w->rows), offsets);
}

SECATEUR_EXPORT void secateur_bitmask_plan(const Bitmask* w, const int64_t* offsets, uint8_t* counts, uint8_t* places,
                                           void* values, int32_t threads) {
    make_plan(*w, offsets, counts, places, values, threads);
}

SECATEUR_EXPORT void secateur_indexed_plan(const Indexed* w, const int64_t* offsets, uint8_t* counts, uint8_t* places,
                                           void* values, int32_t threads) {
    make_plan(*w, offsets, counts, places, values, threads);
}

SECATEUR_EXPORT void secateur_planned_linear(const Plan* w, int64_t width, const void* x, int64_t tokens, int32_t type,
                                             const float* bias, void* y, int32_t threads) {
    const int64_t blocks = blocks_of(w->columns);
    many_tokens(w->rows, w->columns, width, x, tokens, type, bias, y, threads,
                [&](int64_t first, int64_t, Plan& plan) {
                    plan = *w;
                    plan.rows -= first * CHUNK;
                    plan.counts += first * blocks * CHUNK / 2 * 3;
                    plan.offsets += 2 * first * blocks;
                });
}

// The same from a weight whose plan is made for some rows at a time and forgotten.
SECATEUR_EXPORT void secateur_bitmask_many_linear(const Bitmask* w, int64_t width, const void* x, int64_t tokens,
                                                  int32_t type, const float* bias, void* y, int32_t threads) {
    expanded(*w, width, x, tokens, type, bias, y, threads);
}

SECATEUR_EXPORT void secateur_indexed_many_linear(const Indexed* w, int64_t width, const void* x, int64_t tokens,
                                                  int32_t type, const float* bias, void* y, int32_t threads) {
    expanded(*w, width, x, tokens, type, bias, y, threads);
}
