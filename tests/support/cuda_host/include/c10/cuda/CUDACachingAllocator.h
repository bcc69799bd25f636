#pragma once

#include <stddef.h>
#include <stdlib.h>
#include <string.h>

#include <map>

#include "standin/launch.h"

namespace standin {

// The blocks that torch's allocator has allocated and that are not freed yet, with their sizes in bytes. If a block is
// in the pool of a CUDA graph, other tensors may use its memory later (cuda/host.h). overwrite_memory_of_allocator
// overwrites all blocks, as those tensors would.
inline std::map<void*, size_t> of_allocator;
inline int allocations = 0, caches_emptied = 0;

inline void overwrite_memory_of_allocator() {
  for (const auto& [p, bytes] : of_allocator) memset(p, 0xa5, bytes);
}

}  // namespace standin

namespace c10::cuda::CUDACachingAllocator {

inline void* raw_alloc_with_stream(size_t bytes, cudaStream_t stream) {
  standin::note_stream(stream);
  ++standin::allocations;
  void* const p = malloc(bytes);
  standin::of_allocator[p] = bytes;
  return p;
}
inline void raw_delete(void* p) {
  standin::of_allocator.erase(p);
  free(p);
}
inline void emptyCache() { ++standin::caches_emptied; }

}  // namespace c10::cuda::CUDACachingAllocator
