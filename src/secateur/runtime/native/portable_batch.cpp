// Any processor, many tokens: vectors of four, as the compiler has them.
#include "batch.h"
#include "kernels.h"
#include "portable_batch.h"

#if defined(__GNUC__)
namespace secateur::portable_batch {
namespace {

struct Batch {
    typedef float Vec __attribute__((vector_size(16)));
    static constexpr int LANES = 4, VECTORS = PANEL / LANES;
    static Vec zero() { return Vec{}; }
    static Vec add(Vec a, Vec b) { return a + b; }
    static Vec load(const float* p) {
        Vec v;
        std::memcpy(&v, p, sizeof(v));
        return v;
    }
    static void store(float* p, Vec v) { std::memcpy(p, &v, sizeof(v)); }
    static Vec once(Vec v) { return v; }
    static Vec all(float value) { return Vec{value, value, value, value}; }
    static Vec spread(const float* value) { return all(*value); }
    static Vec spread(const uint16_t* value) { return all(widen(*value)); }
    template <typename V>
    static void spread_two(const V* values, Vec& a, Vec& b) {
        a = spread(values), b = spread(values + 1);
    }
    template <typename V>
    static Vec multiplied(Vec values, Vec x, Vec sum) {
        return values * x + sum;
    }
};

}  // namespace

void to_panel(const void* x, int32_t type, int64_t tokens, int64_t width, int64_t columns, float* panel) {
    for (int64_t k = 0; k < columns; ++k, panel += PANEL)
        for (int64_t t = 0; t < PANEL; ++t) {
            const int64_t at = t * width + k;
            const bool is = t < tokens && k < width;
            if (type == F32) panel[t] = is ? static_cast<const float*>(x)[at] : 0.0f;
            else panel[t] = is ? widen(static_cast<const uint16_t*>(x)[at]) : 0.0f;
        }
}

void planned(const Plan& w, const float* panels, int64_t tokens, const Output& out, int64_t first, int64_t last,
             float* sums) {
    planned_by<Batch>(w, panels, tokens, out, first, last, sums);
}

}  // namespace secateur::portable_batch
#endif
