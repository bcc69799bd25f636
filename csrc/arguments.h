// What the operators' arguments must be, and how they become what a kernel is handed. Every check throws a ValueError
// or a TypeError; `op` is the operator's name, for the message.
#pragma once

#include <ATen/core/Tensor.h>

#include <initializer_list>

#include "args.h"
#include "ops.h"

#define CHECK_VALUE(condition, name, ...) TORCH_CHECK_VALUE(condition, op, ": ", name, __VA_ARGS__)
#define CHECK_TYPE(condition, name, ...) TORCH_CHECK_TYPE(condition, op, ": ", name, __VA_ARGS__)

namespace ddpm_ext {

inline const Tensor* pointer(const OptionalTensor& t) { return t.has_value() ? &*t : nullptr; }

DType dtype_of(const char* op, const char* name, at::ScalarType type);
void check_device(const char* op, const char* name, at::Device device);

// The first tensor of an operator: what it is, all others must match.
DType check_sample(const char* op, const char* name, const Tensor& x);
DType check_same(const char* op, const char* name, const Tensor& y, const char* x_name, const Tensor& x);
// A second tensor whose precision may be lower than x's.
DType check_same_or_lower(const char* op, const char* name, const Tensor& y, const char* x_name, const Tensor& x);

// That no element of out is written before another needs it.
void check_overlap(const char* op, const char* name, const Tensor& out, const Tensor& input);
// inputs may hold nulls.
void check_out(const char* op, const Tensor& out, const char* x_name, const Tensor& x,
               std::initializer_list<const Tensor*> inputs);

void set_table(const char* op, Call& args, const Tensor& table, int64_t columns, const OptionalTensor& t,
               int64_t t_index, at::Device device);
void set_rng(const char* op, Call& args, const Rng& rng, at::Device device);
void set_noise(const char* op, Call& args, TensorArg& arg, const Tensor& x, const char* x_name,
               const OptionalTensor& noise, bool draw_noise, const Rng& rng);
void set_clip(const char* op, Call& args, double clip_min, double clip_max);
// A float32 tensor with one number a sample.
void set_scale(const char* op, const char* name, PerSample& scale, const OptionalTensor& given, const Call& args,
               at::Device device);

struct Bound {
  const Tensor* tensor;  // null: the operator has none
  TensorArg* arg;
};

// Shapes, strides and addresses. Dimensions of a sample that lie behind one another in every tensor are merged.
void bind(const char* op, Call& args, std::initializer_list<Bound> inputs, const Tensor& out, TensorArg& out_arg);

}  // namespace ddpm_ext
