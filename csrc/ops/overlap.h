// Functions that say whether strided tensors share memory. torch's own check (ATen/MemoryOverlap.h) cannot decide this
// for tensors that are not dense.
#pragma once

#include <ATen/core/Tensor.h>

namespace ddpm_ext {

// Whether two elements of `t` may have the same address. The result is exact if each stride is larger than the distance
// that the dimensions with smaller strides cover together, as in every slice or permutation of a dense tensor.
// Otherwise the result is true.
bool may_overlap_itself(const at::Tensor& t);

// Whether `a` and `b` may share a byte. The result is exact, with two exceptions. For layouts so complicated that the
// search ends early, it is true. For tensors with different storages it is false, although two storages can have the
// same memory, as when torch.from_numpy is called twice with an array.
bool may_overlap(const at::Tensor& a, const at::Tensor& b);

}  // namespace ddpm_ext
