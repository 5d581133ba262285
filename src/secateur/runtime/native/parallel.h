// Work on rows shared out to threads.
#pragma once
#include <algorithm>
#include <atomic>
#include <cstdint>

namespace secateur {

// Runs task(argument) on `threads` threads at once, the calling one among them, and waits for all.
void run_on(int threads, void (*task)(void*), void* argument);

// body(first, last) for pieces of [0, count), each a multiple of `piece` but the last, in any order.
template <class Body>
void for_pieces(int64_t count, int64_t piece, int threads, const Body& body) {
    struct Work {
        std::atomic<int64_t> next{0};
        int64_t count, piece;
        const Body* body;
    } work{{0}, count, piece, &body};
    const auto task = [](void* argument) {
        auto& w = *static_cast<Work*>(argument);
        for (;;) {
            const int64_t first = w.next.fetch_add(w.piece);
            if (first >= w.count) return;
            (*w.body)(first, std::min(first + w.piece, w.count));
        }
    };
    const int64_t pieces = (count + piece - 1) / piece;
    if (threads <= 1 || pieces <= 1) task(&work);
    else run_on(static_cast<int>(std::min<int64_t>(threads, pieces)), task, &work);
}

}  // namespace secateur
