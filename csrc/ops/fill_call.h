// Fills a kernel's Call from an operator's arguments, and checks the arguments (ops/checks.h).
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/ArrayRef.h>

#include "call.h"
#include "ops/operators.h"

namespace ddpm_ext {

// These functions set the fields of a call that their names say. They check sizes against call.batch, which the caller
// has set.
void set_table(const char* op, Call& call, const Rows& rows, int64_t columns, at::Device device);
void set_rng(const char* op, Call& call, const Rng& rng, at::Device device);
void set_noise(const char* op, Call& call, TensorArg& arg, const Tensor& x, const char* x_name,
               const NoiseSource& source);
void set_clip(const char* op, Call& call, double clip_min, double clip_max);
// Sets a per-sample factor. `values` is float32 (batch,), or null for a factor of 1.
void set_per_sample(const char* op, const char* name, PerSample& factor, const Tensor* values, const Call& call,
                    at::Device device);

// Copies the row into the call if all samples take the same row and the host has the table. set_table must have checked
// the row's number.
void set_host_row(HostRow& call, const Rows& rows);

// Sets the batch, the rows of a step table, the noise and the dtypes of x_t, noise and out.
void set_step(const char* op, Call& call, TensorArg& x, TensorArg& noise, TensorArg& out, const Tensor& x_t,
              const Rows& rows, const NoiseSource& source);

// A tensor of a call, and the TensorArg that describes it to the kernel.
struct Bound {
  const Tensor* tensor;  // null if the call does not have this tensor
  TensorArg* arg;
};

// The order in which a kernel processes a sample's elements: by their logical indices, or in any order. A call that
// draws noise needs `logical`, since the noise of an element depends on its logical index. A call that sums over
// elements needs `logical`, too, since the bits of a sum depend on the order of its terms.
enum class Order { logical, any };
inline Order order_of(const Call& call) { return call.noise_kind == Noise::drawn ? Order::logical : Order::any; }

// Sets the sizes of a call, and the strides and addresses of its tensors. Neighbouring dimensions of a sample are
// merged if the strides of every tensor allow it. With Order::any, the dimensions are first sorted by the strides of
// `out`, if its samples are dense. Then samples that have the layout of `out` in every tensor, such as channels_last,
// count as contiguous.
void bind(const char* op, Call& call, Order order, at::ArrayRef<Bound> inputs, const Tensor& out, TensorArg& out_arg);

}  // namespace ddpm_ext
