// Checks of the operators' tensor arguments. Each raises a ValueError or a TypeError that names the argument, the value
// passed and the value expected. `op` is the operator's name, for the message.
#pragma once

#include <ATen/core/Tensor.h>

#include <initializer_list>

#include "call.h"
#include "ops/operators.h"

#define CHECK_VALUE(condition, name, ...) TORCH_CHECK_VALUE(condition, op, ": ", name, __VA_ARGS__)
#define CHECK_TYPE(condition, name, ...) TORCH_CHECK_TYPE(condition, op, ": ", name, __VA_ARGS__)

namespace ddpm_ext {

DType dtype_of(const char* op, const char* name, at::ScalarType type);
void check_device(const char* op, const char* name, at::Device device);

// Checks the first tensor of an operator. All other tensors must match it.
DType check_sample(const char* op, const char* name, const Tensor& x);
// Checks that y has the shape, dtype and device of x.
DType check_same(const char* op, const char* name, const Tensor& y, const char* x_name, const Tensor& x);
// Checks the same, but y may have a lower precision if x is float32.
DType check_same_or_lower(const char* op, const char* name, const Tensor& y, const char* x_name, const Tensor& x);

// Checks an int64 or float32 tensor with one value for each sample. Returns its stride.
int64_t check_per_sample(const char* op, const char* name, const Tensor& v, at::ScalarType dtype, int64_t batch,
                         at::Device device);
// Checks that the values of v are from 0 to `last`. Values on a GPU are not read back.
void check_range(const char* op, const char* name, const Tensor& v, int64_t last);

// Checks that a result is not a view that torch negates on reading (.imag of .conj()): the kernels write to its memory
// directly.
void check_not_negated(const char* op, const char* name, const Tensor& result);
// Checks that no element of `out` is written before the same memory is needed as an element of `input`.
void check_overlap(const char* op, const char* name, const Tensor& out, const Tensor& input);
// Checks everything about an `out` from the caller. `inputs` may contain null pointers.
void check_out(const char* op, const Tensor& out, const char* x_name, const Tensor& x,
               std::initializer_list<const Tensor*> inputs);

}  // namespace ddpm_ext
