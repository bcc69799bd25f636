// Fills a kernel's Call from an operator's arguments, and checks the arguments (ops/checks.h).
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/ArrayRef.h>

#include "call.h"
#include "ops/operators.h"

namespace ddpm_ext {

// These functions check sizes against call.batch, which must have been set.
void set_table(const char* op, Call& call, const Rows& rows, int64_t columns, at::Device device);
void set_rng(const char* op, Call& call, const Rng& rng, at::Device device);
void set_noise(const char* op, Call& call, TensorArg& arg, const Tensor& x, const char* x_name,
               const NoiseSource& source);
void set_clip(const char* op, Call& call, double clip_min, double clip_max);
// `values` is float32 (batch,), or null.
void set_per_sample(const char* op, const char* name, PerSample& factor, const Tensor* values, const Call& call,
                    at::Device device);

// Stores the row by value if all samples take the same one. set_table must have checked the row.
void set_host_row(HostRow& call, const Rows& rows);

// Sets the batch, the rows of a step table, the noise and the dtypes of x_t, noise and out.
void set_step(const char* op, Call& call, TensorArg& x, TensorArg& noise, TensorArg& out, const Tensor& x_t,
              const Rows& rows, const NoiseSource& source);

struct Bound {
  const Tensor* tensor;  // null: the call does not have it
  TensorArg* arg;
};

// The order in which a kernel processes a sample's elements. Drawn noise depends on an element's logical index, and the
// bits of a sum depend on the order of its terms: those calls need `logical`. `any` is allowed where an element's
// result depends only on its values.
enum class Order { logical, any };
inline Order order_of(const Call& call) { return call.noise_kind == Noise::drawn ? Order::logical : Order::any; }

// Sets shapes, strides and addresses. Neighbouring dimensions of a sample are merged if every tensor's strides allow
// it. For Order::any, the dimensions are first sorted by the strides of `out`. Then tensors that share its layout, such
// as channels_last, are contiguous.
void bind(const char* op, Call& call, Order order, at::ArrayRef<Bound> inputs, const Tensor& out, TensorArg& out_arg);

}  // namespace ddpm_ext
