// Memory for large results on the CPU. When a result is freed, its memory is kept for the next result.
//
// In a loop x = step(x), each result is allocated while the previous one is still alive. The C library returns large
// blocks to the system as soon as they are freed. Getting their pages back from the system, one by one, costs up to ten
// times as much as a step.
#pragma once

#include <ATen/core/Tensor.h>

namespace ddpm_ext {

// Like at::empty_like and at::empty, contiguous. The storages of large results on the CPU behave like any others: they
// can be resized, shared and saved.
at::Tensor empty_result_like(const at::Tensor& like, at::ScalarType dtype);
at::Tensor empty_result(at::IntArrayRef size, const at::TensorOptions& options);

struct ResultMemory {
  size_t limit, kept, kept_blocks, used;  // in bytes, except kept_blocks
};
ResultMemory result_memory();
void release_result_memory();
void limit_result_memory(size_t bytes);  // the most that is kept. Initially 0: nothing is kept

}  // namespace ddpm_ext
