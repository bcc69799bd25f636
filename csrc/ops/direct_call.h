// Decides whether an eager call may skip torch's dispatcher. A call must not skip it if autograd records the call,
// under a mode or a function transform, or if an argument is not an ordinary CPU or CUDA tensor, such as a subclass.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/ArrayRef.h>

#include "ops/operators.h"

namespace ddpm_ext {

// An argument that may be a tensor, and its name for error messages.
struct NamedTensor {
  const char* name;
  const Tensor* tensor;  // null if the argument is missing or a number

  NamedTensor(const char* name, const Tensor& t) : name(name), tensor(&t) {}
  NamedTensor(const char* name, const OptionalTensor& t) : name(name), tensor(pointer(t)) {}
  template <class Number>
  NamedTensor(const char* name, const Number&) : name(name), tensor(nullptr) {}
};

// Whether no mode of torch that intercepts calls is active (autocast does not) and every tensor is an ordinary CPU or
// CUDA tensor. Then a kernel may be called directly if autograd does not record the call.
bool plain(at::ArrayRef<NamedTensor> tensors);

// Checks that every tensor is strided and neither nested nor quantized, and that it is on the first tensor's device or
// is a 0-dimensional CPU tensor.
void check_agreement(const char* op, at::ArrayRef<NamedTensor> tensors);

// Whether the call must go through the dispatcher. Raises NotImplementedError for a forward-mode derivative. If the
// call must go through the dispatcher, check_agreement raises ValueError for tensors that do not agree.
bool needs_dispatcher(const char* op, at::ArrayRef<NamedTensor> tensors);

// Raises ValueError if a tensor requires a gradient and gradients are enabled. The message says that `recorder` records
// no gradients.
void refuse_grad(const char* op, at::ArrayRef<NamedTensor> tensors, const char* recorder);

}  // namespace ddpm_ext
