// Whether strided tensors share an element. torch's own check (ATen/MemoryOverlap.h) answers "too hard" for any that
// are not dense.
#pragma once

#include <ATen/core/Tensor.h>

namespace ddpm_ext {

// Whether two elements of `t` may lie at one place. Exact where each stride steps over all that smaller ones reach,
// as in every slice or permutation of a dense tensor; elsewhere it says yes.
bool may_overlap_itself(const at::Tensor& t);

// Whether `a` and `b` share a byte. Exact, but for layouts so tangled that the search is given up: then it says yes.
bool may_overlap(const at::Tensor& a, const at::Tensor& b);

}  // namespace ddpm_ext
