// Whether strided tensors share memory. torch's own check (ATen/MemoryOverlap.h) cannot decide for tensors that are not
// dense.
#pragma once

#include <ATen/core/Tensor.h>

namespace ddpm_ext {

// Whether two elements of `t` may have the same address. The answer is exact if each stride is larger than the extent
// of all smaller strides together, as in every slice or permutation of a dense tensor. Otherwise the answer is yes.
bool may_overlap_itself(const at::Tensor& t);

// Whether `a` and `b` share a byte. The answer is exact unless the layouts are so complicated that the search gives up;
// then it is yes.
bool may_overlap(const at::Tensor& a, const at::Tensor& b);

}  // namespace ddpm_ext
