// The operators of eager calls: without torch's dispatcher, which would cost more than the arithmetic of a small step,
// unless it has something to do (ops/direct_call.h). Each has the name and the parameters of its operator in
// ops/operators.h.
#pragma once

#include "ops/operators.h"

namespace ddpm_ext::eager {

inline OptionalTensor optional(const Tensor* tensor) {
  return tensor == nullptr ? OptionalTensor() : OptionalTensor(*tensor);
}

decltype(ddpm_ext::reverse_step) reverse_step;
decltype(ddpm_ext::check_reverse_step) check_reverse_step;
decltype(ddpm_ext::step_with_options) step_with_options;
decltype(ddpm_ext::x_start_scale) x_start_scale;
decltype(ddpm_ext::output_scale) output_scale;
decltype(ddpm_ext::forward_process) forward_process;
decltype(ddpm_ext::forward_process_and_noise) forward_process_and_noise;
decltype(ddpm_ext::diffusion_loss) diffusion_loss;
decltype(ddpm_ext::predict_start) predict_start;
decltype(ddpm_ext::posterior_mean) posterior_mean;

}  // namespace ddpm_ext::eager
