// The steps of eager calls, and what is computed of samples before a step: without torch's dispatcher unless it has
// something to do (ops/direct_call.h).
#pragma once

#include "ops/library.h"

namespace ddpm_ext::eager {

inline OptionalTensor optional(const Tensor* tensor) {
  return tensor == nullptr ? OptionalTensor() : OptionalTensor(*tensor);
}

Tensor reverse_step(const Tensor& x_t, const Tensor& model_output, const Tensor& table, const OptionalTensor& t,
                    int64_t t_index, double clip_min, double clip_max, const OptionalTensor& noise, bool draw_noise,
                    DDPM_RNG_PARAMETERS, const OptionalTensor& out);

// `noise` is the tensor of `given`.
void step_with_options(const StepInputs& given, const Tensor& table, const OptionalTensor& t, int64_t t_index,
                       double clip_min, double clip_max, const OptionalTensor& noise, bool draw_noise, const Rng& rng);

Tensor x_start_scale(const Tensor& x_t, const OptionalTensor& model_output, const OptionalTensor& table,
                     const OptionalTensor& t, int64_t t_index, double quantile, double maximum,
                     const OptionalTensor& uncond_output, const OptionalTensor& output_scale);

Tensor output_scale(const Tensor& model_output, const Tensor& uncond_output, double guidance, double rescale);

// Checks these arguments of reverse_step, so that an error comes before a model is called.
void check_reverse_step(const Tensor& x_t, const Tensor& table, const OptionalTensor& t, int64_t t_index,
                        const OptionalTensor& noise, bool draw_noise, DDPM_RNG_PARAMETERS, const OptionalTensor& out);

}  // namespace ddpm_ext::eager
