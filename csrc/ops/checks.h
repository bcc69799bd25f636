// Checks of the operators' tensor arguments. A check raises ValueError or TypeError, with a message that names the
// operator (`op`), the argument, its value and the expected value.
#pragma once

#include <ATen/core/Tensor.h>

#include <initializer_list>

#include "call.h"
#include "ops/operators.h"

#define CHECK_VALUE(condition, name, ...) TORCH_CHECK_VALUE(condition, op, ": ", name, __VA_ARGS__)
#define CHECK_TYPE(condition, name, ...) TORCH_CHECK_TYPE(condition, op, ": ", name, __VA_ARGS__)

namespace ddpm_ext {

// Returns the DType of a torch dtype. Raises TypeError for a dtype that the kernels do not have.
DType dtype_of(const char* op, const char* name, at::ScalarType type);
// Checks that the device is a CPU, or a GPU if the extension was built with CUDA kernels.
void check_device(const char* op, const char* name, at::Device device);

// Checks the dtype, device and number of dimensions of an operator's first tensor, x. Other checks compare tensors with
// x.
DType check_sample(const char* op, const char* name, const Tensor& x);
// Checks that y has the shape, dtype and device of x.
DType check_same(const char* op, const char* name, const Tensor& y, const char* x_name, const Tensor& x);
// Like check_same, but y may be float16 or bfloat16 if x is float32.
DType check_same_or_lower(const char* op, const char* name, const Tensor& y, const char* x_name, const Tensor& x);

// Checks that v has the shape (batch,), this dtype (int64 or float32) and this device. Returns its stride.
int64_t check_per_sample(const char* op, const char* name, const Tensor& v, at::ScalarType dtype, int64_t batch,
                         at::Device device);
// Checks that the values of v are from 0 to `last`. Does nothing if v is on a GPU.
void check_range(const char* op, const char* name, const Tensor& v, int64_t last);

// Checks that a result is not a view whose values torch negates when it reads them, such as .imag of .conj(). The
// kernels would write the values without the negation.
void check_not_negated(const char* op, const char* name, const Tensor& result);
// Checks that `out` either shares no memory with `input`, or has the same elements at the same addresses. Otherwise a
// kernel might overwrite an element of `input` before reading it.
void check_overlap(const char* op, const char* name, const Tensor& out, const Tensor& input);
// Checks an `out` from the caller: that it is like x, that no two of its elements share memory, and check_overlap with
// each of the inputs. `inputs` may contain null pointers.
void check_out(const char* op, const Tensor& out, const char* x_name, const Tensor& x,
               std::initializer_list<const Tensor*> inputs);

}  // namespace ddpm_ext
