#include "control.h"

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#endif

namespace standin {

void poison([[maybe_unused]] void* p, [[maybe_unused]] size_t size) {
#ifdef __SANITIZE_ADDRESS__
  __asan_poison_memory_region(p, size);
#endif
}

void unpoison([[maybe_unused]] void* p, [[maybe_unused]] size_t size) {
#ifdef __SANITIZE_ADDRESS__
  __asan_unpoison_memory_region(p, size);
#endif
}

}  // namespace standin
