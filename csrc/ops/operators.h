// The operators over torch tensors, for the CPU and CUDA. Each checks every argument before it reads or writes any
// element. A ValueError or a TypeError names the argument, the value passed and the value expected.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

#include "core/step_inputs.h"

namespace ddpm_ext {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline const Tensor* pointer(const OptionalTensor& t) { return t.has_value() ? &*t : nullptr; }

// The source of drawn noise (core/philox.h).
// - `seed`, a 0-dimensional int64 tensor on the CPU or on the samples' device, replaces seed_value, which holds the
//   bits of an unsigned 64-bit number.
// - `sample_ids`, int64 (batch,), replaces first_id + 0, 1, 2 ...
// - A negative draw means the draw of the sample's row. `draw_data`, int64 () on the CPU or on the samples' device,
//   replaces draw.
struct Rng {
  OptionalTensor seed;
  int64_t seed_value;
  OptionalTensor sample_ids;
  int64_t first_id, stream, draw;
  OptionalTensor draw_data;
};

// The table rows that the samples take. `table` is float32 (rows, columns). `t`, int64 (batch,), replaces t_index.
// `on_host` is null or the same table on the CPU; then a step takes the row of t_index from it by value.
struct Rows {
  Tensor table;
  OptionalTensor t;
  int64_t t_index = 0;
  const Tensor* on_host = nullptr;
};

// Noise from the caller, or drawn from `rng` if draw_noise is true. Without either there is no noise.
struct NoiseSource {
  OptionalTensor noise;
  bool draw_noise;
  Rng rng;
};

// Computes x_{t-1} from x_t (batch, ...) and the model's output of the same shape. `rows` are of a step table, float32
// (rows, 24). Without noise and with draw_noise false, the result is the mean.
Tensor reverse_step(const Tensor& x_t, const Tensor& model_output, const Rows& rows, double clip_min, double clip_max,
                    const NoiseSource& source, const OptionalTensor& out);

// Checks these arguments of reverse_step, so that an error comes before the model is called.
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

// Writes the next sample to `out`, by the rows of a step table. A missing model_output counts as 0. The noise comes
// from `source`. If only arguments of the plain step are present, the plain step's kernel runs.
void step_with_options(StepInputs arguments, const Rows& rows, double clip_min, double clip_max,
                       const NoiseSource& source);

// Computes k0 x_start + k1 noise by the rows of a table, float32 (rows, 2). Without noise and with draw_noise false,
// the result is k0 x_start.
Tensor forward_process(const Tensor& x_start, const Rows& rows, const NoiseSource& source, const OptionalTensor& out);

// Computes the same with drawn noise. Returns the result and the noise if both are float32 on a CPU; otherwise the
// noise is an undefined tensor.
std::tuple<Tensor, Tensor> forward_process_and_noise(const Tensor& x_start, const Rows& rows, const Rng& rng);

// Computes the training loss of each sample, and its derivative ("slope") by the model's output. Both are float32.
//
// The loss compares the model's output with the target k0 x_start + k1 noise, by the rows of a table, float32 (rows,
// 4). It is multiplied by the row's weight. Without x_start the target is k1 noise.
// - `kind`: 0 for the squared difference, 1 for the absolute difference, 2 for Huber's loss with `delta`. Each is the
//   mean over a sample.
// - `reduction`: 0 for the mean over the batch, 1 for the losses (batch,), 2 for their sum.
// - `want_slope`: if false, the slope is empty. For reduction 1 it is the slope of the sum.
// - `variational`: adds a term of the variational bound, by rows (rows, 8); see core/loss.h. Then x_start is required,
//   and the model's output may have twice the channels of x_start, the second half for the variance.
// - `detach_mean`: the bound's term adds nothing to the slope of the first half.
// - `overwrite_noise`: the slope may reuse the memory of `noise`, if that has the layout of the model's output. Only
//   for noise made by forward_process_and_noise.
std::tuple<Tensor, Tensor> diffusion_loss(const Tensor& model_output, const OptionalTensor& x_start, const Rows& rows,
                                          int64_t kind, double delta, const OptionalTensor& noise, const Rng& rng,
                                          int64_t reduction, bool want_slope, bool variational, bool detach_mean,
                                          bool overwrite_noise);

// Computes 1 / bound of each sample, float32 (batch,): the x_start_scale of dynamic thresholding. The bound is the
// quantile of |x0|, but at least 1 and at most `maximum`. x0 is the predicted clean sample of a step with these
// arguments, before it is scaled and clipped. Without model_output and table, x0 is x_t.
Tensor x_start_scale(const Tensor& x_t, const OptionalTensor& model_output, const OptionalTensor& table,
                     const OptionalTensor& t, int64_t t_index, double quantile, double maximum,
                     const OptionalTensor& uncond_output, const OptionalTensor& output_scale);

// Computes 1 + rescale (std(model_output) / std(guided) - 1) of each sample, float32 (batch,), where guided is
// uncond_output + guidance (model_output - uncond_output): the output_scale of rescaled guidance.
Tensor output_scale(const Tensor& model_output, const Tensor& uncond_output, double guidance, double rescale);

// Computes k0 x_t + k1 noise.
Tensor predict_start(const Tensor& x_t, const Tensor& noise, const Rows& rows);

// Computes k0 x_start + k1 x_t.
Tensor posterior_mean(const Tensor& x_start, const Tensor& x_t, const Rows& rows);

// Draws the noise contract's standard normals, of shape (batch, ...).
Tensor randn(at::IntArrayRef size, const Rng& rng, at::ScalarType dtype, at::Device device);

// Draws a seed from torch's default CPU generator.
int64_t draw_seed();

}  // namespace ddpm_ext
