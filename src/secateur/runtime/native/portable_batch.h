// What the files without special instructions share.
#pragma once
#include <cstdint>

namespace secateur {

struct Plan;
struct Output;

namespace portable_batch {
#if defined(__aarch64__)
constexpr int PANEL = 32;  // half of the registers for the sums of two rows
#else
constexpr int PANEL = 16;
#endif
void to_panel(const void* x, int32_t type, int64_t tokens, int64_t width, int64_t columns, float* panel);
void planned(const Plan&, const float* panels, int64_t tokens, const Output&, int64_t first, int64_t last, float*);
}  // namespace portable_batch

}  // namespace secateur
