// Whether strided tensors share memory. torch's own check (ATen/MemoryOverlap.h) gives no answer for tensors that are
// not dense.
#pragma once

#include <ATen/core/Tensor.h>

namespace ddpm_ext {

// Whether two elements of `t` may lie at the same place. The answer is exact if each stride is longer than everything
// that the smaller strides reach, as in every slice or permutation of a dense tensor. Otherwise it is yes.
bool may_overlap_itself(const at::Tensor& t);

// Whether `a` and `b` share a byte. The answer is exact unless the layouts are so complicated that the search is given
// up; then it is yes.
bool may_overlap(const at::Tensor& a, const at::Tensor& b);

}  // namespace ddpm_ext
