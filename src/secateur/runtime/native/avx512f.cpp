// AVX-512F: what Skylake and its kin have.
#if defined(__AVX512F__) || defined(SECATEUR_EMULATED)
#include "avx512.h"

namespace secateur {
namespace {

using Bfloats16 = WidenedSteps<uint16_t, uint32_t>;
using Bytes16 = WidenedSteps<int8_t, uint64_t>;

void bitmask(const Bitmask& w, const void* x, int64_t tokens, const Output& out, int64_t first, int64_t last) {
    if (w.type == F32) streamed<FloatSteps, false>(w, x, tokens, out, first, last);
    if (w.type == BF16) streamed<Bfloats16, false>(w, x, tokens, out, first, last);
    if (w.type == INT8) streamed<Bytes16, false>(w, x, tokens, out, first, last);
}

void dense(const Dense& w, const void* x, int64_t tokens, const Output& out, int64_t first, int64_t last) {
    if (w.type == F32) streamed<FloatSteps, true>(w, x, tokens, out, first, last);
    if (w.type == BF16) streamed<Bfloats16, true>(w, x, tokens, out, first, last);
}

}  // namespace

const Kernels* avx512f() {
    using namespace avx2_batch;
    static const Kernels kernels{
        "avx512f", in_order, bitmask, indexed_of<Avx2>, blocks_of_rows<Avx512>, dense, PANEL, to_panel, plan, planned_f32, false};
    return &kernels;
}

}  // namespace secateur
#else
#include "kernels.h"
const secateur::Kernels* secateur::avx512f() { return nullptr; }
#endif
