// The AVX-512 intrinsics that the kernels use, in plain C++ as Intel's manual describes them, so that their logic can be
// tested on processors without them. Included before everything else, in place of the compiler's own.
#pragma once
#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>

namespace emulated {

template <typename Vector, typename Lane>
struct Lanes {
    static constexpr int COUNT = sizeof(Vector) / sizeof(Lane);
    Lane of[COUNT];
    explicit Lanes(const Vector& v) { std::memcpy(of, &v, sizeof(v)); }
    Lanes() : of{} {}
    Vector vector() const {
        Vector v;
        std::memcpy(&v, of, sizeof(v));
        return v;
    }
};
using Floats = Lanes<__m512, float>;
template <typename Lane>
using Integers = Lanes<__m512i, Lane>;

template <typename Vector, typename Lane>
inline Vector expand(uint64_t mask, const Vector& v) {
    const Lanes<Vector, Lane> from(v);
    Lanes<Vector, Lane> to;
    for (int lane = 0, next = 0; lane < to.COUNT; ++lane)
        if (mask >> lane & 1) to.of[lane] = from.of[next++];
    return to.vector();
}

template <class F>
inline __m512 each(const F& f) {
    Floats to;
    for (int lane = 0; lane < to.COUNT; ++lane) to.of[lane] = f(lane);
    return to.vector();
}

template <class F>
inline __m512i each_integer(const F& f) {
    Integers<int32_t> to;
    for (int lane = 0; lane < to.COUNT; ++lane) to.of[lane] = f(lane);
    return to.vector();
}

template <typename Vector>
inline Vector load(const void* p) {
    Vector v;
    std::memcpy(&v, p, sizeof(v));
    return v;
}

inline float of_bfloat16(uint32_t bits) {
    bits <<= 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return std::fpclassify(value) == FP_SUBNORMAL ? std::copysign(0.0f, value) : value;
}

inline __m512 aligned(const void* p) {
    if (reinterpret_cast<uintptr_t>(p) % 64) __builtin_trap();  // as the processor would
    return load<__m512>(p);
}

inline __m512 dot(const __m512& sum, const __m512bh& a, const __m512bh& b) {
    uint32_t x[16], y[16];
    std::memcpy(x, &a, sizeof(x));
    std::memcpy(y, &b, sizeof(y));
    const Floats before(sum);
    return each([&](int i) {
        const float odd = std::fmaf(of_bfloat16(x[i] >> 16), of_bfloat16(y[i] >> 16), before.of[i]);
        return std::fmaf(of_bfloat16(x[i] & 0xffff), of_bfloat16(y[i] & 0xffff), odd);
    });
}

inline __m512 fma(const __m512& a, const __m512& b, const __m512& c) {
    const Floats x(a), y(b), z(c);
    return each([&](int i) { return std::fmaf(x.of[i], y.of[i], z.of[i]); });
}

inline __m512 add(const __m512& a, const __m512& b) {
    const Floats x(a), y(b);
    return each([&](int i) { return x.of[i] + y.of[i]; });
}

inline float reduce(const __m512& v) {
    const Floats x(v);
    float sum = 0;
    for (float value : x.of) sum += value;
    return sum;
}

inline __m512i widen(const __m256i& v) {
    uint16_t from[16];
    std::memcpy(from, &v, sizeof(from));
    return each_integer([&](int i) { return from[i]; });
}

inline __m512i widen_signed(const __m128i& v) {
    int8_t from[16];
    std::memcpy(from, &v, sizeof(from));
    return each_integer([&](int i) { return from[i]; });
}

inline __m512i shift_left(const __m512i& v, unsigned by) {
    const Integers<uint32_t> x(v);
    return each_integer([&](int i) { return static_cast<int32_t>(x.of[i] << by); });
}

inline __m512i bitwise_and(const __m512i& a, const __m512i& b) {
    const Integers<int32_t> x(a), y(b);
    return each_integer([&](int i) { return x.of[i] & y.of[i]; });
}

inline __m512 to_floats(const __m512i& v) {
    const Integers<int32_t> x(v);
    return each([&](int i) { return static_cast<float>(x.of[i]); });
}

template <typename To, typename From>
inline To cast(const From& v) {
    return load<To>(&v);
}

}  // namespace emulated

#define _mm512_setzero_ps() emulated::each([](int) { return 0.0f; })
#define _mm512_set1_ps(value) emulated::each([&](int) { return value; })
#define _mm512_set1_epi32(value) emulated::each_integer([&](int) { return value; })
#define _mm512_add_ps emulated::add
#define _mm512_fmadd_ps emulated::fma
#define _mm512_reduce_add_ps emulated::reduce
#define _mm512_loadu_ps emulated::load<__m512>
#define _mm512_load_ps emulated::aligned
#define _mm512_store_ps(p, v) (emulated::aligned(p), std::memcpy(p, &(v), 64))
#define _mm512_loadu_si512 emulated::load<__m512i>
#define _mm512_maskz_expand_ps emulated::expand<__m512, float>
#define _mm512_maskz_expand_epi32 emulated::expand<__m512i, int32_t>
#define _mm512_maskz_expand_epi16 emulated::expand<__m512i, int16_t>
#define _mm512_maskz_expand_epi8 emulated::expand<__m512i, int8_t>
#define _mm512_cvtepu16_epi32 emulated::widen
#define _mm512_cvtepi8_epi32 emulated::widen_signed
#define _mm512_cvtepi32_ps emulated::to_floats
#define _mm512_slli_epi32 emulated::shift_left
#define _mm512_and_si512 emulated::bitwise_and
#define _mm512_castsi512_ps emulated::cast<__m512>
#define _mm512_castps_si512 emulated::cast<__m512i>
#define _mm512_dpbf16_ps emulated::dot
