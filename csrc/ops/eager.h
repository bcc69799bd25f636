// The operators of eager calls: without torch's dispatcher, which would cost more than the arithmetic of a small step,
// unless it has something to do (ops/direct_call.h). Each is the operator of its name in ops/operators.h.
#pragma once

#include "ops/operators.h"

namespace ddpm_ext::eager {

inline OptionalTensor optional(const Tensor* tensor) {
  return tensor == nullptr ? OptionalTensor() : OptionalTensor(*tensor);
}

Tensor reverse_step(const Tensor& x_t, const Tensor& model_output, const Rows& rows, double clip_min, double clip_max,
                    const NoiseSource& source, const OptionalTensor& out);
void check_reverse_step(const Tensor& x_t, const Rows& rows, const NoiseSource& source, const OptionalTensor& out);
void step_with_options(StepInputs given, const Rows& rows, double clip_min, double clip_max, const NoiseSource& source);
Tensor x_start_scale(const Tensor& x_t, const OptionalTensor& model_output, const OptionalTensor& table,
                     const OptionalTensor& t, int64_t t_index, double quantile, double maximum,
                     const OptionalTensor& uncond_output, const OptionalTensor& output_scale);
Tensor output_scale(const Tensor& model_output, const Tensor& uncond_output, double guidance, double rescale);
Tensor forward_process(const Tensor& x_start, const Rows& rows, const NoiseSource& source, const OptionalTensor& out);
std::tuple<Tensor, Tensor> forward_process_and_noise(const Tensor& x_start, const Rows& rows, const Rng& rng);
std::tuple<Tensor, Tensor> diffusion_loss(const Tensor& model_output, const OptionalTensor& x_start, const Rows& rows,
                                          int64_t kind, double delta, const OptionalTensor& noise, const Rng& rng,
                                          int64_t reduction, bool want_slope, bool variational, bool detach_mean,
                                          bool overwrite_noise);
Tensor predict_start(const Tensor& x_t, const Tensor& noise, const Rows& rows);
Tensor posterior_mean(const Tensor& x_start, const Tensor& x_t, const Rows& rows);

}  // namespace ddpm_ext::eager
