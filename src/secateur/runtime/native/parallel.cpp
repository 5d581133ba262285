#include "parallel.h"

#include <thread>
#include <vector>

#include "export.h"

namespace secateur {
namespace {

// The OpenMP runtime that torch has loaded, if it is one with GNU's entry point: its threads exist already
// and are bound and counted by torch's settings.
using Gomp = void (*)(void (*)(void*), void*, unsigned, unsigned);
std::atomic<Gomp> gomp{nullptr};

}  // namespace

void run_on(int threads, void (*task)(void*), void* argument) {
    // A team may be smaller than asked; the task takes what is left from a counter, so that is no fault.
    if (const Gomp parallel = gomp.load()) return parallel(task, argument, static_cast<unsigned>(threads), 0);
    std::vector<std::thread> others;
    others.reserve(threads - 1);
    try {
        while (static_cast<int>(others.size()) < threads - 1) others.emplace_back(task, argument);
    } catch (...) {  // the system has no more threads: those that run do the work
    }
    task(argument);
    for (auto& other : others) other.join();
}

}  // namespace secateur

SECATEUR_EXPORT void secateur_borrow_threads(void* gomp_parallel) {
    secateur::gomp.store(reinterpret_cast<secateur::Gomp>(gomp_parallel));
}
