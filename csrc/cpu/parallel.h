// Spreads a loop over the threads that torch's own operators use.
//
// at::parallel_for does this only if torch has its own thread pool. But torch's wheels use OpenMP. With OpenMP,
// at::parallel_for is a template that becomes a serial loop unless it is compiled with OpenMP. On Linux, clang's OpenMP
// calls another library than the one that torch has loaded, and Apple's clang has no OpenMP. Both OpenMP libraries,
// GNU's and LLVM's, have the function GOMP_parallel, by which g++ starts a parallel region. This file calls
// GOMP_parallel by name, so that every compiler uses the threads of the library that torch has loaded.
#pragma once

#include <ATen/Parallel.h>
#include <stdint.h>

#include <algorithm>

#if AT_PARALLEL_OPENMP && !defined(_OPENMP)
// Weak symbols, so that the module loads even if torch has loaded no OpenMP library.
extern "C" {
__attribute__((weak)) void GOMP_parallel(void (*region)(void*), void* data, unsigned threads, unsigned flags);
__attribute__((weak)) int omp_get_num_threads();
__attribute__((weak)) int omp_get_thread_num();
}
#endif

namespace ddpm_ext::cpu {

// Calls f(begin, end) for equal ranges of the indices 0 to count - 1. There are as many ranges as threads, but at most
// one range for each `grain` indices, and only one within another parallel region. f must not throw.
template <class F>
void parallel_for(int64_t count, int64_t grain, const F& f) {
#if AT_PARALLEL_OPENMP && !defined(_OPENMP)
  const bool serial =
      count <= grain || GOMP_parallel == nullptr || at::in_parallel_region() || at::get_num_threads() == 1;
  if (serial) {
    if (count > 0) f(int64_t{0}, count);
    return;
  }
  struct Loop {
    int64_t count, grain;
    const F& f;
  } loop{count, grain, f};
  const auto region = [](void* data) {
    const Loop& loop = *static_cast<const Loop*>(data);
    const int64_t ranges = std::min<int64_t>(omp_get_num_threads(), (loop.count + loop.grain - 1) / loop.grain);
    const int64_t length = (loop.count + ranges - 1) / ranges, begin = omp_get_thread_num() * length;
    if (begin >= loop.count) return;
    const at::internal::ThreadIdGuard number(omp_get_thread_num());  // makes at::get_thread_num() return it in f
    loop.f(begin, std::min(loop.count, begin + length));
  };
  GOMP_parallel(region, &loop, 0, 0);  // 0: torch's number of threads; another number would create new threads
#else
  at::parallel_for(0, count, grain, f);
#endif
}

}  // namespace ddpm_ext::cpu
