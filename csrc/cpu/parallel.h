// Spreads a loop over the threads of torch's own operators.
//
// at::parallel_for does that too where torch has a thread pool of its own. Torch's wheels have OpenMP instead, and then
// its template is a serial loop unless the compiler brings OpenMP along: clang's calls another library than the one
// that torch has loaded on Linux, and Apple's has none. But both libraries, GNU's and LLVM's, have the function by
// which g++ begins a parallel region. Here it is called by its name, so that every compiler uses the threads that are
// there.
#pragma once

#include <ATen/Parallel.h>
#include <stdint.h>

#include <algorithm>

#if AT_PARALLEL_OPENMP && !defined(_OPENMP)
// Weak, so that the module loads where torch came with neither library.
extern "C" {
__attribute__((weak)) void GOMP_parallel(void (*region)(void*), void* data, unsigned threads, unsigned flags);
__attribute__((weak)) int omp_get_num_threads();
__attribute__((weak)) int omp_get_thread_num();
}
#endif

namespace ddpm_ext::cpu {

// Calls f(begin, end) for equal parts of [0, count): as many as there are threads, but no more than one for each
// `grain`. f must not throw.
template <class F>
void parallel_for(int64_t count, int64_t grain, const F& f) {
#if AT_PARALLEL_OPENMP && !defined(_OPENMP)
  const bool alone =
      count <= grain || GOMP_parallel == nullptr || at::in_parallel_region() || at::get_num_threads() == 1;
  if (alone) {
    if (count > 0) f(int64_t{0}, count);
    return;
  }
  struct Loop {
    int64_t count, grain;
    const F& f;
  } loop{count, grain, f};
  const auto region = [](void* data) {
    const Loop& loop = *static_cast<const Loop*>(data);
    const int64_t parts = std::min<int64_t>(omp_get_num_threads(), (loop.count + loop.grain - 1) / loop.grain);
    const int64_t part = (loop.count + parts - 1) / parts, begin = omp_get_thread_num() * part;
    if (begin >= loop.count) return;
    const at::internal::ThreadIdGuard number(omp_get_thread_num());  // what at::get_thread_num() returns in f
    loop.f(begin, std::min(loop.count, begin + part));
  };
  GOMP_parallel(region, &loop, 0, 0);  // 0: as many threads as torch has set; another number would start the pool anew
#else
  at::parallel_for(0, count, grain, f);
#endif
}

}  // namespace ddpm_ext::cpu
