// A library that records which threads run the iterations of parallel_for. It is compiled without the compiler's
// OpenMP.
#include <functional>
#include <thread>

#include "cpu/parallel.h"

using ddpm_ext::cpu::parallel_for;

namespace {

int64_t this_thread() { return static_cast<int64_t>(std::hash<std::thread::id>()(std::this_thread::get_id())); }

}  // namespace

extern "C" {

// Runs a parallel loop over i from 0 to count - 1. An iteration adds 1 to calls[i], and writes its thread to threads[i]
// and the beginning of that thread's range to begins[i].
void mark_threads(int64_t count, int64_t grain, int64_t* calls, int64_t* threads, int64_t* begins) {
  parallel_for(count, grain, [=](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) calls[i] += 1, threads[i] = this_thread(), begins[i] = begin;
  });
}

// Runs a parallel loop of `inner` iterations in each of the `outer` iterations of another parallel loop. Writes the
// thread of every inner iteration to `threads`, of shape (outer, inner).
void mark_nested(int64_t outer, int64_t inner, int64_t* threads) {
  parallel_for(outer, 1, [=](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      parallel_for(inner, 1, [=](int64_t first, int64_t last) {
        for (int64_t k = first; k < last; ++k) threads[i * inner + k] = this_thread();
      });
    }
  });
}
}
