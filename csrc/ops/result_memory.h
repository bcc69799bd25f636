// Memory for large results on the CPU. The memory of a freed result is reused for a later result of the same size.
//
// In a loop x = step(x), each result is allocated while the previous result is still alive. The C library returns a
// large block to the system as soon as it is freed. Getting the pages of the block back from the system, one by one,
// takes up to ten times as long as a step.
#pragma once

#include <ATen/core/Tensor.h>

namespace ddpm_ext {

// Return uninitialised tensors: empty_result_like like at::empty_like, and empty_result a contiguous tensor like
// at::empty. Their storages can be resized, shared and saved like any other storages.
at::Tensor empty_result_like(const at::Tensor& like, at::ScalarType dtype);
at::Tensor empty_result(at::IntArrayRef size, const at::TensorOptions& options);

// The memory of freed results that waits for reuse (kept), its largest allowed size (limit), the number of its blocks
// (kept_blocks), and the memory of large results that are alive (used). In bytes, except kept_blocks.
struct ResultMemory {
  size_t limit, kept, kept_blocks, used;
};
ResultMemory result_memory();
// Returns all memory that waits for reuse to the system.
void release_result_memory();
// Sets the limit of memory that waits for reuse, and calls release_result_memory. The first limit is 0: no memory is
// reused.
void limit_result_memory(size_t bytes);

}  // namespace ddpm_ext
