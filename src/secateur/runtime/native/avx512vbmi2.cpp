// AVX-512 with VBMI2: Ice Lake and later.
#if defined(__AVX512VBMI2__) || defined(SECATEUR_EMULATED)
#include "avx512_expand.h"

namespace secateur {

const Kernels* avx512vbmi2() {
    using namespace avx2_batch;
    static const Kernels kernels{"avx512vbmi2", dealt,    bitmask_expanded, indexed_of<Avx2>, blocks_of_rows<Avx512>, dense_expanded,
                                 PANEL,         to_panel, plan,             planned_f32,      false};
    return &kernels;
}

}  // namespace secateur
#else
#include "kernels.h"
const secateur::Kernels* secateur::avx512vbmi2() { return nullptr; }
#endif
