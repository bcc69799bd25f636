// Decides whether an eager call may skip torch's dispatcher. It may not if it records gradients, or if a mode, a
// function transform or a tensor subclass is active.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/ArrayRef.h>

#include "ops/operators.h"

namespace ddpm_ext {

// An argument and its name, for error messages.
struct Named {
  const char* name;
  const Tensor* tensor;  // null: the argument is missing or a number

  Named(const char* name, const Tensor& t) : name(name), tensor(&t) {}
  Named(const char* name, const OptionalTensor& t) : name(name), tensor(pointer(t)) {}
  template <class Number>
  Named(const char* name, const Number&) : name(name), tensor(nullptr) {}
};

// Whether a kernel may be called directly: no mode is active, and every tensor is an ordinary CPU or CUDA tensor.
bool plain(at::ArrayRef<Named> tensors);

// Checks that all tensors are strided, and that each is on the first tensor's device or is a 0-dimensional CPU tensor.
// The dispatcher chooses the kernel by the first tensor's device.
void check_agreement(const char* op, at::ArrayRef<Named> tensors);

// Whether the call must go through the dispatcher. Raises NotImplementedError for forward-mode derivatives, and
// ValueError if the dispatcher could not choose a kernel.
bool needs_dispatcher(const char* op, at::ArrayRef<Named> tensors);

// Raises ValueError if a tensor requires a gradient. `recorder` names what does not record gradients, for the message.
void refuse_grad(const char* op, at::ArrayRef<Named> tensors, const char* recorder);

}  // namespace ddpm_ext
