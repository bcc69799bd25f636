// Decides whether an eager call may skip torch's dispatcher: not if it records gradients, nor if a mode, a function
// transform or a tensor subclass is at work.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/ArrayRef.h>

#include "ops/operators.h"

namespace ddpm_ext {

// An argument and its name, for the message.
struct Named {
  const char* name;
  const Tensor* tensor;  // null: it was not given, or is a number

  Named(const char* name, const Tensor& t) : name(name), tensor(&t) {}
  Named(const char* name, const OptionalTensor& t) : name(name), tensor(pointer(t)) {}
  template <class Number>
  Named(const char* name, const Number&) : name(name), tensor(nullptr) {}
};

// Whether no mode is active and every tensor is an ordinary one of the CPU or of CUDA, so that a kernel may be called
// directly.
bool plain(at::ArrayRef<Named> tensors);

// Checks that all tensors are strided and on the first one's device, by which the dispatcher chooses the kernel, or
// numbers on the CPU.
void check_agreement(const char* op, at::ArrayRef<Named> tensors);

// Whether the dispatcher must be called. Raises NotImplementedError for forward-mode derivatives, and ValueError if the
// dispatcher could not choose a kernel.
bool needs_dispatcher(const char* op, at::ArrayRef<Named> tensors);

// Raises ValueError if a tensor requires a gradient that `recorder` would not record.
void refuse_grad(const char* op, at::ArrayRef<Named> tensors, const char* recorder);

}  // namespace ddpm_ext
