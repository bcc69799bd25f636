// Checks of the operators' tensor arguments. Each throws a ValueError or a TypeError that says which argument is wrong,
// what came and what is expected. `op` is the operator's name, for the message.
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

// Checks the first tensor of an operator, which all others must match.
DType check_sample(const char* op, const char* name, const Tensor& x);
// Checks that y has the shape, dtype and device of x.
DType check_same(const char* op, const char* name, const Tensor& y, const char* x_name, const Tensor& x);
// Checks the same, but y may have a lower precision if x is float32.
DType check_same_or_lower(const char* op, const char* name, const Tensor& y, const char* x_name, const Tensor& x);

// Checks an int64 or float32 tensor with one value for each sample. Returns its stride.
int64_t check_per_sample(const char* op, const char* name, const Tensor& v, at::ScalarType dtype, int64_t batch,
                         at::Device device);
// Checks that its values are from 0 to `last`. Values on a GPU are not read back.
void check_range(const char* op, const char* name, const Tensor& v, int64_t last);

// Checks that a result is no view whose elements torch negates on reading: the kernels write memory.
void check_not_negated(const char* op, const char* name, const Tensor& result);
// Checks that no element of out is written before it is needed as an element of `input`.
void check_overlap(const char* op, const char* name, const Tensor& out, const Tensor& input);
// Checks everything about a given `out`. `inputs` may contain null pointers.
void check_out(const char* op, const Tensor& out, const char* x_name, const Tensor& x,
               std::initializer_list<const Tensor*> inputs);

}  // namespace ddpm_ext
