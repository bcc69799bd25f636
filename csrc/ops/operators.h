// The operators over torch tensors, for the CPU and CUDA. An operator checks all of its arguments before it reads or
// writes any element. It raises ValueError or TypeError, with a message that names the argument, its value and the
// expected value.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

#include "core/step_inputs.h"

namespace ddpm_ext {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// Returns a pointer to the tensor, or null if there is none.
inline const Tensor* pointer(const OptionalTensor& t) { return t.has_value() ? &*t : nullptr; }

// The numbers that determine drawn noise (core/philox.h). `seed` and `draw_data` are int64 () on the CPU or on the
// samples' device.
// - seed_value has the bits of the seed, an unsigned 64-bit number. If `seed` has a value, it replaces seed_value.
// - The sample ids are first_id, first_id + 1, and so on. If `sample_ids`, int64 (batch,), has a value, it has the ids.
// - A negative `draw` means that each sample has the draw of its row of a step table or, with other tables, the number
//   of its row. If `draw_data` has a value, it replaces `draw`.
struct Rng {
  OptionalTensor seed;
  int64_t seed_value;
  OptionalTensor sample_ids;
  int64_t first_id, stream, draw;
  OptionalTensor draw_data;
};

// The table rows that the samples take. `table` is float32 (rows, columns). All samples take the row t_index. But if
// `t`, int64 (batch,), has a value, sample i takes the row t[i]. `on_host` is null or the same table on the CPU. With
// on_host and without `t`, a step passes the row t_index to a CUDA kernel by value.
struct Rows {
  Tensor table;
  OptionalTensor t;
  int64_t t_index = 0;
  const Tensor* on_host = nullptr;
};

// The noise of a call: the tensor `noise` from the caller; or noise drawn with `rng`, if draw_noise is true; or no
// noise.
struct NoiseSource {
  OptionalTensor noise;
  bool draw_noise;
  Rng rng;
};

// Computes the next sample from x_t (batch, ...) and the model's output, which has the same shape. `rows` has a step
// table, float32 (rows, 24). If `source` has no noise, the result is the mean.
Tensor reverse_step(const Tensor& x_t, const Tensor& model_output, const Rows& rows, double clip_min, double clip_max,
                    const NoiseSource& source, const OptionalTensor& out);

// Checks the arguments of reverse_step except the model's output and the clip, so that an error comes before the model
// is called.
void check_reverse_step(const Tensor& x_t, const Rows& rows, const NoiseSource& source, const OptionalTensor& out);

// The tensors and flags of the step with options. A tensor is null if the caller did not pass it.
struct StepInputs {
  const Tensor *inputs[kRoles] = {}, *factors[kFactors] = {}, *results[kResults] = {};
  DDPM_FLAGS(DDPM_BOOL)

  const Tensor* operator[](Role role) const { return inputs[static_cast<int>(role)]; }
  const Tensor* operator[](Factor factor) const { return factors[static_cast<int>(factor)]; }
  const Tensor* operator[](Result result) const { return results[static_cast<int>(result)]; }
  const Tensor*& operator[](Role role) { return inputs[static_cast<int>(role)]; }
  const Tensor*& operator[](Factor factor) { return factors[static_cast<int>(factor)]; }
  const Tensor*& operator[](Result result) { return results[static_cast<int>(result)]; }
};

// Writes the next sample to the result `out`, by the rows of a step table. A missing model_output counts as 0. If the
// caller passes only arguments of reverse_step, the kernel of reverse_step runs.
void step_with_options(StepInputs arguments, const Rows& rows, double clip_min, double clip_max,
                       const NoiseSource& source);

// Computes k0 x_start + k1 noise by the rows of a table, float32 (rows, 2). If `source` has no noise, the result is
// k0 x_start.
Tensor forward_process(const Tensor& x_start, const Rows& rows, const NoiseSource& source, const OptionalTensor& out);

// Like forward_process with drawn noise. Returns the result and the noise. The noise is an undefined tensor unless
// x_start is float32 on a CPU.
std::tuple<Tensor, Tensor> forward_process_and_noise(const Tensor& x_start, const Rows& rows, const Rng& rng);

// Computes the training loss of each sample, and its derivative ("slope") by the model's output. Both are float32.
//
// The loss compares the model's output with the target k0 x_start + k1 noise, by the rows of a table, float32 (rows,
// 4), and is multiplied by the row's weight. Without x_start the target is k1 noise. Without `noise`, `rng` draws it.
// - `kind`: 0 for the squared difference, 1 for the absolute difference, 2 for Huber's loss with `delta`, as the mean
//   over the elements of a sample.
// - `reduction`: 0 for the mean over the batch, 1 for the losses (batch,), 2 for their sum.
// - `want_slope`: if false, the returned slope is empty. For reduction 1, the slope is that of the sum.
// - `variational`: adds a term of the variational bound, by a table of 8 columns (core/loss.h). This requires x_start.
//   The model's output may then have twice the channels of x_start: the second half is the output for the variance.
// - `detach_mean`: the bound's term adds nothing to the slope of the output for the mean.
// - `overwrite_noise`: the slope is written to the memory of `noise`, if `noise` has the layout of the model's output.
//   Only for the noise of forward_process_and_noise, which the caller does not need afterwards.
std::tuple<Tensor, Tensor> diffusion_loss(const Tensor& model_output, const OptionalTensor& x_start, const Rows& rows,
                                          int64_t kind, double delta, const OptionalTensor& noise, const Rng& rng,
                                          int64_t reduction, bool want_slope, bool variational, bool detach_mean,
                                          bool overwrite_noise);

// Computes 1 / bound for each sample, float32 (batch,): the x_start_scale of dynamic thresholding. The bound is the
// quantile of |x0|, but at least 1 and at most `maximum`. x0 is the predicted clean sample of a step with these
// arguments, before the step scales and clips it. Without model_output and table, x0 is x_t.
Tensor x_start_scale(const Tensor& x_t, const OptionalTensor& model_output, const OptionalTensor& table,
                     const OptionalTensor& t, int64_t t_index, double quantile, double maximum,
                     const OptionalTensor& uncond_output, const OptionalTensor& output_scale);

// Computes 1 + rescale (std(model_output) / std(guided) - 1) for each sample, float32 (batch,): the output_scale of
// rescaled guidance. `guided` is uncond_output + guidance (model_output - uncond_output).
Tensor output_scale(const Tensor& model_output, const Tensor& uncond_output, double guidance, double rescale);

// Computes the predicted clean sample k0 x_t + k1 noise, by the rows of a table, float32 (rows, 2).
Tensor predict_start(const Tensor& x_t, const Tensor& noise, const Rows& rows);

// Computes the posterior mean k0 x_start + k1 x_t, by the rows of a table, float32 (rows, 2).
Tensor posterior_mean(const Tensor& x_start, const Tensor& x_t, const Rows& rows);

// Draws standard normals of shape (batch, ...). A negative draw counts as 0.
Tensor randn(at::IntArrayRef size, const Rng& rng, at::ScalarType dtype, at::Device device);

// Draws a seed from torch's default CPU generator.
int64_t draw_seed();

}  // namespace ddpm_ext
