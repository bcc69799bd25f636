// Memory for large results on the CPU, which is kept for the next result when it is freed.
//
// In a loop x = step(x), each result is allocated while the last one lives, and the C library gives the memory of large
// blocks back to the system as soon as they are freed. To receive its pages anew, one by one, costs up to ten times as
// much as a step.
#pragma once

#include <ATen/core/Tensor.h>

namespace ddpm_ext {

// As at::empty_like and at::empty, contiguous. The storages of large results on the CPU are like any other: they can be
// resized, shared and saved.
at::Tensor empty_result_like(const at::Tensor& like, at::ScalarType dtype);
at::Tensor empty_result(at::IntArrayRef size, const at::TensorOptions& options);

struct ResultMemory {
  size_t limit, kept, kept_blocks, used;  // bytes, but for kept_blocks
};
ResultMemory result_memory();
void release_result_memory();
void limit_result_memory(size_t bytes);  // what is kept at most. 0, which it is at first: nothing is

}  // namespace ddpm_ext
