// The operators, on either device. Each checks every argument before it reads or writes anything: a ValueError or a
// TypeError names the argument, what came and what is expected.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

namespace ddpm_ext {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// Where drawn noise comes from: see "noise contract" in core/philox.h. `seed` (0-d int64, on the CPU or the samples'
// device) stands in for seed_value, which holds an unsigned 64-bit number's bits; `sample_ids` (batch,) int64 stands in
// for first_id + 0, 1, 2 ...; a negative draw means the timestep's own.
struct Rng {
  OptionalTensor seed;
  int64_t seed_value;
  OptionalTensor sample_ids;
  int64_t first_id, stream, draw;
};

// x_{t-1} from x_t (batch, ...) and the model's output of the same shape, by the rows (rows, 8) of a step table.
// `t` (batch,) int64 stands in for t_index. Without noise and with draw_noise false: the mean.
Tensor reverse_step(const Tensor& x_t, const Tensor& model_output, const Tensor& table, const OptionalTensor& t,
                    int64_t t_index, double clip_min, double clip_max, const OptionalTensor& noise, bool draw_noise,
                    const Rng& rng, const OptionalTensor& out);

// What reverse_step says of these arguments, before a model is called with them.
void check_reverse_step(const Tensor& x_t, const Tensor& table, const OptionalTensor& t, int64_t t_index,
                        const OptionalTensor& noise, bool draw_noise, const Rng& rng, const OptionalTensor& out);

// What an extended step takes beside a step's arguments: see core/extended.h. All that is given has x_t's shape, the
// scales (batch,) excepted; `uncond_output` and `model_variance` have the model output's dtype, the scales are float32,
// the others are as x_t.
struct Extras {
  OptionalTensor uncond_output, output_scale, model_variance;
  bool log_variance;
  OptionalTensor x_start, x_start_scale, history, gradient, known, mask;
  OptionalTensor out_copy, x0_out;  // written
};

// The next sample into `out`, by the rows (rows, 16) of an extended table. Without a model's output it counts as 0.
void extended_step(const Tensor& x_t, const OptionalTensor& model_output, const Tensor& table, const OptionalTensor& t,
                   int64_t t_index, double clip_min, double clip_max, const OptionalTensor& noise, bool draw_noise,
                   const Rng& rng, const Extras& extras, const Tensor& out);

// k0 x_start + k1 noise by the rows (rows, 2) of `table`. Without noise and with draw_noise false: k0 x_start.
Tensor forward_process(const Tensor& x_start, const Tensor& table, const OptionalTensor& t, int64_t t_index,
                       const OptionalTensor& noise, bool draw_noise, const Rng& rng, const OptionalTensor& out);

// Losses of samples (batch,), float32: of the model's output against k0 x_start + k1 noise, times the row's weight, by
// the rows (rows, 4) of `table`; `kind` 0 the squared difference, 1 its size, 2 Huber's with `delta`, each a mean over
// the sample. Without x_start, k0 counts as 0. `reduction` 0: their mean, 1: as they are, 2: their sum. And its slope
// by the model's output (of their sum, where they are as they are), float32; an empty tensor, unless it is wanted.
// `variational`: with the variational bound's term, by rows (rows, 8), see core/loss.h. The model's output may have
// twice the channels of x_start, which must be there then, the second half for the variance. With `detach_mean` the
// bound has no slope in the first half.
std::tuple<Tensor, Tensor> diffusion_loss(const Tensor& model_output, const OptionalTensor& x_start,
                                          const Tensor& table, const OptionalTensor& t, int64_t t_index, int64_t kind,
                                          double delta, const OptionalTensor& noise, const Rng& rng, int64_t reduction,
                                          bool want_slope, bool variational, bool detach_mean);

// k0 x_t + k1 noise.
Tensor predict_start(const Tensor& x_t, const Tensor& noise, const Tensor& table, const OptionalTensor& t,
                     int64_t t_index);

// k0 x_start + k1 x_t.
Tensor posterior_mean(const Tensor& x_start, const Tensor& x_t, const Tensor& table, const OptionalTensor& t,
                      int64_t t_index);

// The contract's standard normals, of shape (batch, ...).
Tensor randn(at::IntArrayRef size, const Rng& rng, at::ScalarType dtype, at::Device device);

// A seed from torch's default CPU generator.
int64_t draw_seed();

}  // namespace ddpm_ext
