#pragma once

#include <stdlib.h>

namespace c10::cuda::CUDACachingAllocator {

inline void* raw_alloc_with_stream(size_t bytes, cudaStream_t) { return malloc(bytes); }
inline void raw_delete(void* p) { free(p); }

}  // namespace c10::cuda::CUDACachingAllocator
