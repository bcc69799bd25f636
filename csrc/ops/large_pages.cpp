#include "ops/large_pages.h"

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace ddpm_ext {

#if defined(__linux__) && defined(MADV_HUGEPAGE)

at::Tensor in_large_pages(at::Tensor fresh) {
  constexpr uintptr_t kSmall = 1u << 12, kLarge = 1u << 21;
  if (!fresh.is_cpu() || fresh.nbytes() < 2 * kLarge) return fresh;
  const auto begin = reinterpret_cast<uintptr_t>(fresh.mutable_data_ptr());
  const uintptr_t first = (begin + kSmall - 1) / kSmall * kSmall, last = (begin + fresh.nbytes()) / kSmall * kSmall;
  // This is only a hint. A system without such pages refuses it, and nothing else changes.
  if (first < last) (void)madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
  return fresh;
}

#else

at::Tensor in_large_pages(at::Tensor fresh) { return fresh; }

#endif

}  // namespace ddpm_ext
