// The operators as torch's dispatcher has them: an Rng is spread over arguments, since a schema knows no structs.
#pragma once

#include <ATen/core/Tensor.h>

#include "ops.h"

#define DDPM_RNG_PARAMETERS                                                                                           \
  const OptionalTensor &seed, int64_t seed_value, const OptionalTensor &sample_ids, int64_t first_id, int64_t stream, \
      int64_t draw
#define DDPM_RNG \
  ddpm_ext::Rng { seed, seed_value, sample_ids, first_id, stream, draw }
#define DDPM_RNG_ARGUMENTS seed, seed_value, sample_ids, first_id, stream, draw

#define DDPM_EXTRAS_PARAMETERS                                                                                   \
  const OptionalTensor &uncond_output, const OptionalTensor &output_scale, const OptionalTensor &model_variance, \
      bool log_variance, const OptionalTensor &x_start, const OptionalTensor &x_start_scale,                     \
      const OptionalTensor &history, const OptionalTensor &gradient, const OptionalTensor &known,                \
      const OptionalTensor &mask, const OptionalTensor &out_copy, const OptionalTensor &x0_out
#define DDPM_EXTRAS                                                                                                    \
  ddpm_ext::Extras {                                                                                                   \
    uncond_output, output_scale, model_variance, log_variance, x_start, x_start_scale, history, gradient, known, mask, \
        out_copy, x0_out                                                                                               \
  }

namespace ddpm_ext::library {

Tensor reverse_step(const Tensor& x_t, const Tensor& model_output, const Tensor& table, const OptionalTensor& t,
                    int64_t t_index, double clip_min, double clip_max, const OptionalTensor& noise, bool draw_noise,
                    DDPM_RNG_PARAMETERS);
void reverse_step_out(const Tensor& x_t, const Tensor& model_output, const Tensor& table, const OptionalTensor& t,
                      int64_t t_index, double clip_min, double clip_max, const OptionalTensor& noise, bool draw_noise,
                      DDPM_RNG_PARAMETERS, Tensor& out);
void extended_step(const Tensor& x_t, const OptionalTensor& model_output, const Tensor& table, const OptionalTensor& t,
                   int64_t t_index, double clip_min, double clip_max, const OptionalTensor& noise, bool draw_noise,
                   DDPM_RNG_PARAMETERS, const Tensor& out, DDPM_EXTRAS_PARAMETERS);
Tensor forward_process(const Tensor& x_start, const Tensor& table, const OptionalTensor& t, int64_t t_index,
                       const OptionalTensor& noise, bool draw_noise, DDPM_RNG_PARAMETERS);
void forward_process_out(const Tensor& x_start, const Tensor& table, const OptionalTensor& t, int64_t t_index,
                         const OptionalTensor& noise, bool draw_noise, DDPM_RNG_PARAMETERS, Tensor& out);
Tensor randn(at::IntArrayRef size, DDPM_RNG_PARAMETERS, at::ScalarType dtype, at::Device device);
std::tuple<Tensor, Tensor> diffusion_loss(const Tensor& model_output, const OptionalTensor& x_start,
                                          const Tensor& table, const OptionalTensor& t, int64_t t_index, int64_t kind,
                                          double delta, const OptionalTensor& noise, DDPM_RNG_PARAMETERS,
                                          int64_t reduction, bool want_slope, bool variational, bool detach_mean);
Tensor draw_seed();

}  // namespace ddpm_ext::library
