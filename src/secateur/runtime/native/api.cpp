// The library's C interface. Arguments are checked by the caller (`runtime/native.py`), once a weight.
#include <algorithm>
#include <vector>

#include "export.h"
#include "kernels.h"
#include "parallel.h"
#include "plan.h"

using namespace secateur;

namespace {

// Of this processor, the best first.
const std::vector<const Kernels*>& usable() {
    static const std::vector<const Kernels*> found = [] {
        std::vector<const Kernels*> sets;
        const auto add = [&](const Kernels* set, bool supported) {
            if (set && supported) sets.push_back(set);
        };
#if defined(SECATEUR_EMULATED)  // by the tests
        const bool avx2_there = true, wide = true, expand = true, dot = true;
#elif defined(__x86_64__)
        __builtin_cpu_init();
        const bool avx2_there = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                                __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("popcnt");
        const bool wide = avx2_there && __builtin_cpu_supports("avx512f");
        const bool expand = wide && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                            __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vbmi2");
        const bool dot = expand && __builtin_cpu_supports("avx512bf16");
#endif
#if defined(__x86_64__)
        add(avx512bf16(), dot);
        add(avx512vbmi2(), expand);
        add(avx512f(), wide);
        add(avx2(), avx2_there);
#endif
        add(neon(), true);
        add(portable(), true);
        return sets;
    }();
    return found;
}

const Kernels*& chosen() {
    static const Kernels* kernels = usable().front();
    return kernels;
}

// At least so many bytes, aligned to 64, that stay until the next call with the same buffer.
void* at_least(std::vector<char>& buffer, int64_t bytes) {
    if (static_cast<int64_t>(buffer.size()) < bytes + 64) buffer.resize(static_cast<size_t>(bytes) + 64);
    return reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(buffer.data()) + 63) / 64 * 64);
}

// Columns of one token, from `width` on zeros, dealt out to N vectors in each step.
template <int N, typename X>
void deal(const X* x, int64_t width, int64_t columns, float* to) {
    constexpr int STEP = 16 * N;
    const auto number = [](X value) {
        if constexpr (sizeof(X) == 4) return value;
        else return widen(value);
    };
    const int64_t whole = width / STEP * STEP;
    for (int64_t k = 0; k < whole; k += STEP)
        for (int v = 0; v < N; ++v)
            for (int i = 0; i < 16; ++i) to[k + 16 * v + i] = number(x[k + N * i + v]);
    if (whole < columns) std::memset(to + whole, 0, static_cast<size_t>(columns - whole) * sizeof(float));
    for (int64_t k = whole; k < width; ++k) to[whole + 16 * (k % N) + (k - whole) / N] = number(x[k]);
}

// x[tokens, columns] as the kernels take it; x itself where it is that already.
const void* taken(Input input, const void* x, int32_t type, int64_t tokens, int64_t width, int64_t columns,
                  std::vector<char>& scratch) {
    const bool as_it_is = (input == AS_BF16 && type == BF16) || (input == IN_ORDER && type == F32);
    if (as_it_is && width == columns) return x;
    const int64_t size = input == AS_BF16 ? 2 : 4;
    auto* const to = static_cast<char*>(at_least(scratch, tokens * columns * size));
    for (int64_t t = 0; t < tokens; ++t) {
        char* const bytes = to + t * columns * size;
        if (as_it_is) {
            std::memcpy(bytes, static_cast<const char*>(x) + t * width * size, static_cast<size_t>(width * size));
            std::memset(bytes + width * size, 0, static_cast<size_t>((columns - width) * size));
            continue;
        }
        const auto all = [&](const auto* from) {
            auto* const wide = reinterpret_cast<float*>(bytes);
            if (input == DEALT_4) deal<4>(from, width, columns, wide);
            else if (input == DEALT_2) deal<2>(from, width, columns, wide);
            else deal<1>(from, width, columns, wide);
        };
        if (type == F32) all(static_cast<const float*>(x) + t * width);
        else all(static_cast<const uint16_t*>(x) + t * width);
    }
    return to;
}

template <class Weight, class Kernel>
void linear(const Weight& w, Kernel kernel, Input input, int64_t width, int64_t pieces, int64_t weights, const void* x,
            int64_t tokens, int32_t type, const float* bias, void* y, int32_t threads) {
    static thread_local std::vector<char> scratch;
    const void* wide = taken(input, x, type, tokens, width, w.columns, scratch);
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
// `kind` is the type of its values; for PAIRS x is bfloat16, and `columns` counts pairs.
template <class PlanOf>
void many_tokens(int32_t kind, int64_t rows, int64_t columns, int64_t width, const void* x, int64_t tokens,
                 int32_t type, const float* bias, void* y, int32_t threads, const PlanOf& plan_of) {
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
                isa.to_panel(static_cast<const char*>(x) + (from + token) * width * size, kind == PAIRS ? PAIRS : type,
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

// f(kind) with the kind of plan whose values are of this type.
template <class F>
void with_kind(int32_t type, const F& f) {
    if (type == F32) f(Floats{});
    if (type == BF16) f(Bfloats{});
    if (type == PAIRS) f(Pairs{});
}

template <class Kind>
void fill(const Bitmask& w, int64_t chunk, int64_t slot, const int64_t* offsets, uint8_t* counts, uint8_t* places,
          void* values) {
    if (chosen()->plan && Kind::PER_ENTRY == 1) chosen()->plan(w, chunk, slot, offsets, counts, places, values);
    else fill_chunk<Kind>(w, chunk, slot, offsets, counts, places, values);
}

template <class Kind, class Weight>
void fill(const Weight& w, int64_t chunk, int64_t slot, const int64_t* offsets, uint8_t* counts, uint8_t* places,
          void* values) {
    fill_chunk<Kind>(w, chunk, slot, offsets, counts, places, values);
}

template <class Weight>
void make_plan(const Weight& w, int32_t type, const int64_t* offsets, uint8_t* counts, uint8_t* places, void* values,
               int32_t threads) {
    with_kind(type, [&](auto kind) {
        for_pieces(chunks_of(w.rows), 1, threads, [&](int64_t first, int64_t last) {
            for (int64_t c = first; c < last; ++c) fill<decltype(kind)>(w, c, c, offsets, counts, places, values);
        });
    });
}

template <class Weight>
void expanded(const Weight& w, int64_t width, const void* x, int64_t tokens, int32_t type, const float* bias, void* y,
              int32_t threads) {
    const bool pairs = chosen()->pairs && w.type == BF16 && type == BF16;
    const int32_t values_type = pairs ? PAIRS : w.type == BF16 ? BF16 : F32;
    with_kind(values_type, [&](auto kind) {
        using Kind = decltype(kind);
        const int64_t columns = entries_of<Kind>(w.columns), blocks = blocks_of(columns);
        many_tokens(values_type, w.rows, columns, width, x, tokens, type, bias, y, threads,
                    [&](int64_t first, int64_t last, Plan& plan) {
                        static thread_local std::vector<char> memory[4];
                        const int64_t parts = (last - first) * blocks;
                        auto* offsets = static_cast<int64_t*>(at_least(memory[0], 16 * (parts + 1)));
                        offsets_of<Kind>(w, first, last - first, offsets);
                        auto* counts = static_cast<uint8_t*>(at_least(memory[1], parts * CHUNK / 2 * 3));
                        auto* places = static_cast<uint8_t*>(at_least(memory[2], offsets[2 * parts]));
                        const int64_t size = sizeof(typename Kind::value);
                        void* values = at_least(memory[3], offsets[2 * parts + 1] * size);
                        for (int64_t c = first; c < last; ++c)
                            fill<Kind>(w, c, c - first, offsets, counts, places, values);
                        plan = {w.rows - first * CHUNK, columns, counts, places, values, offsets, values_type};
                    });
    });
}

}  // namespace

// The version of this interface: Python refuses another.
SECATEUR_EXPORT int32_t secateur_version() { return 2; }

SECATEUR_EXPORT const char* secateur_kernels() { return chosen()->name; }

// Choose kernels by name, or the best for this processor by "". 0, or 1 where they are not to be had.
SECATEUR_EXPORT int32_t secateur_choose(const char* name) {
    for (const Kernels* set : usable())
        if (!*name || !std::strcmp(name, set->name)) {
            chosen() = set;
            return 0;
        }
    return 1;
}

// The name of the i-th best set of kernels for this processor; null past the last.
SECATEUR_EXPORT const char* secateur_usable(int32_t i) {
    return i < static_cast<int32_t>(usable().size()) ? usable()[static_cast<size_t>(i)]->name : nullptr;
}

// y[tokens, rows] = x[tokens, width] W' + bias, x and y both float32 or both bfloat16.
SECATEUR_EXPORT void secateur_bitmask_linear(const Bitmask* w, int64_t width, const void* x, int64_t tokens,
                                             int32_t type, const float* bias, void* y, int32_t threads) {
    const int64_t groups = (w->rows + ROWS - 1) / ROWS;
    const Kernels& isa = *chosen();
    linear(*w, isa.bitmask, isa.input(w->type, type), width, groups, w->starts[groups], x, tokens, type, bias, y,
           threads);
}

SECATEUR_EXPORT void secateur_indexed_linear(const Indexed* w, int64_t width, const void* x, int64_t tokens,
                                             int32_t type, const float* bias, void* y, int32_t threads) {
    linear(*w, chosen()->indexed, IN_ORDER, width, w->rows, w->starts[w->rows], x, tokens, type, bias, y, threads);
}

SECATEUR_EXPORT void secateur_blocks_linear(const Blocks* w, int64_t width, const void* x, int64_t tokens, int32_t type,
                                            const float* bias, void* y, int32_t threads) {
    const int64_t groups = (w->rows + BLOCK_ROWS - 1) / BLOCK_ROWS;
    linear(*w, chosen()->blocks, IN_ORDER, width, groups, w->starts[groups] * BLOCK_ROWS, x, tokens, type, bias, y,
           threads);
}

SECATEUR_EXPORT void secateur_dense_linear(const Dense* w, int64_t width, const void* x, int64_t tokens, int32_t type,
                                           const float* bias, void* y, int32_t threads) {
    const int64_t groups = (w->rows + ROWS - 1) / ROWS;
    const Kernels& isa = *chosen();
    linear(*w, isa.dense, isa.input(w->type, type), width, groups, w->rows * w->columns, x, tokens, type, bias, y,
           threads);
}

// Whether plans of PAIRS can be used.
SECATEUR_EXPORT int32_t secateur_pairs() { return chosen()->pairs; }

// Where the parts of a plan with values of this type begin: offsets[chunks * blocks + 1, 2], in places and values.
SECATEUR_EXPORT void secateur_bitmask_offsets(const Bitmask* w, int32_t type, int64_t* offsets) {
    with_kind(type, [&](auto kind) { offsets_of<decltype(kind)>(*w, 0, chunks_of(w->rows), offsets); });
}

SECATEUR_EXPORT void secateur_indexed_offsets(const Indexed* w, int32_t type, int64_t* offsets) {
    with_kind(type, [&](auto kind) { offsets_of<decltype(kind)>(*w, 0, chunks_of(w->rows), offsets); });
}

SECATEUR_EXPORT void secateur_blocks_offsets(const Blocks* w, int32_t type, int64_t* offsets) {
    with_kind(type, [&](auto kind) { offsets_of<decltype(kind)>(*w, 0, chunks_of(w->rows), offsets); });
}

SECATEUR_EXPORT void secateur_bitmask_plan(const Bitmask* w, int32_t type, const int64_t* offsets, uint8_t* counts,
                                           uint8_t* places, void* values, int32_t threads) {
    make_plan(*w, type, offsets, counts, places, values, threads);
}

SECATEUR_EXPORT void secateur_indexed_plan(const Indexed* w, int32_t type, const int64_t* offsets, uint8_t* counts,
                                           uint8_t* places, void* values, int32_t threads) {
    make_plan(*w, type, offsets, counts, places, values, threads);
}

SECATEUR_EXPORT void secateur_blocks_plan(const Blocks* w, int32_t type, const int64_t* offsets, uint8_t* counts,
                                          uint8_t* places, void* values, int32_t threads) {
    make_plan(*w, type, offsets, counts, places, values, threads);
}

SECATEUR_EXPORT void secateur_planned_linear(const Plan* w, int64_t width, const void* x, int64_t tokens, int32_t type,
                                             const float* bias, void* y, int32_t threads) {
    const int64_t blocks = blocks_of(w->columns);
    many_tokens(w->type, w->rows, w->columns, width, x, tokens, type, bias, y, threads,
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

SECATEUR_EXPORT void secateur_blocks_many_linear(const Blocks* w, int64_t width, const void* x, int64_t tokens,
                                                 int32_t type, const float* bias, void* y, int32_t threads) {
    expanded(*w, width, x, tokens, type, bias, y, threads);
}
