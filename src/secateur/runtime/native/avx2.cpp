// AVX2 and FMA. Eight columns at a time: one byte of the mask chooses how the next values spread over a
// vector of eight float32. bfloat16 values land in the upper halves of their lanes, int8 values in the top
// bytes (so they are 2^24 times too large, which the scale undoes), and need no conversion of width.
#if defined(__AVX2__) && defined(__FMA__)
#include "avx2.h"
#include "streaming.h"

namespace secateur {
namespace {

void bitmask(const Bitmask& w, const void* x, int64_t tokens, const Output& out, int64_t first, int64_t last) {
    if (w.type == F32) streamed<Streamed<Float>, false>(w, x, tokens, out, first, last);
    if (w.type == BF16) streamed<Streamed<Bfloat>, false>(w, x, tokens, out, first, last);
    if (w.type == INT8) streamed<Streamed<Byte>, false>(w, x, tokens, out, first, last);
}

void dense(const Dense& w, const void* x, int64_t tokens, const Output& out, int64_t first, int64_t last) {
    if (w.type == F32) streamed<Streamed<Float>, true>(w, x, tokens, out, first, last);
    if (w.type == BF16) streamed<Streamed<Bfloat>, true>(w, x, tokens, out, first, last);
}

}  // namespace

const Kernels* avx2() {
    using namespace avx2_batch;
    static const Kernels kernels{
        "avx2", in_order, bitmask, indexed_of<Avx2>, blocks_of_rows<Avx2>, dense, PANEL, to_panel, plan, planned, false};
    return &kernels;
}

}  // namespace secateur
#else
#include "kernels.h"
const secateur::Kernels* secateur::avx2() { return nullptr; }
#endif
