// Runs kernels of another processor under an emulator: reads cases from standard input, writes results to standard
// output. A case is a row of int64 (see `Case`), then its buffers, each after its number of bytes.
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "kernels.h"
#include "plan.h"

using namespace secateur;

extern "C" {
int32_t secateur_choose(const char* name);
const char* secateur_kernels();
void secateur_bitmask_linear(const Bitmask*, int64_t, const void*, int64_t, int32_t, const float*, void*, int32_t);
void secateur_indexed_linear(const Indexed*, int64_t, const void*, int64_t, int32_t, const float*, void*, int32_t);
void secateur_blocks_linear(const Blocks*, int64_t, const void*, int64_t, int32_t, const float*, void*, int32_t);
void secateur_blocks_many_linear(const Blocks*, int64_t, const void*, int64_t, int32_t, const float*, void*, int32_t);
void secateur_bitmask_many_linear(const Bitmask*, int64_t, const void*, int64_t, int32_t, const float*, void*, int32_t);
void secateur_indexed_many_linear(const Indexed*, int64_t, const void*, int64_t, int32_t, const float*, void*, int32_t);
}

struct Case {
    int64_t format, many, rows, columns, width, tokens, weight_type, x_type, group;
};

static std::vector<char> buffer() {
    int64_t size = 0;
    if (std::fread(&size, 8, 1, stdin) != 1) std::exit(2);
    std::vector<char> bytes(static_cast<size_t>(size) + 64);
    if (size && std::fread(bytes.data(), static_cast<size_t>(size), 1, stdin) != 1) std::exit(2);
    return bytes;
}

template <typename T>
static const T* as(const std::vector<char>& bytes) {
    return reinterpret_cast<const T*>(bytes.data());
}

int main(int, char** arguments) {
    if (secateur_choose(arguments[1])) return 1;
    std::fprintf(stderr, "%s\n", secateur_kernels());
    for (Case c; std::fread(&c, sizeof(c), 1, stdin) == 1;) {
        const auto places = buffer(), values = buffer(), starts = buffer(), scales = buffer(), x = buffer();
        const auto bias = buffer();
        const auto weight_type = static_cast<int32_t>(c.weight_type), type = static_cast<int32_t>(c.x_type);
        std::vector<char> y(static_cast<size_t>(c.tokens * c.rows * (type == F32 ? 4 : 2)));
        if (c.format == 2) {
            const Blocks w{c.rows,         c.columns,           as<uint16_t>(places),
                           values.data(), as<int64_t>(starts), weight_type};
            (c.many ? secateur_blocks_many_linear : secateur_blocks_linear)(
                &w, c.width, x.data(), c.tokens, type, as<float>(bias), y.data(), 2);
        } else if (c.format == 1) {
            const Indexed w{c.rows,         c.columns,           as<uint16_t>(places),
                            values.data(), as<int64_t>(starts), weight_type};
            (c.many ? secateur_indexed_many_linear : secateur_indexed_linear)(
                &w, c.width, x.data(), c.tokens, type, as<float>(bias), y.data(), 2);
        } else {
            const Bitmask w{c.rows,        c.columns,           as<uint8_t>(places),  values.data(),
                            as<int64_t>(starts), as<uint16_t>(scales), c.group, weight_type};
            (c.many ? secateur_bitmask_many_linear : secateur_bitmask_linear)(
                &w, c.width, x.data(), c.tokens, type, as<float>(bias), y.data(), 2);
        }
        std::fwrite(y.data(), 1, y.size(), stdout);
    }
}
