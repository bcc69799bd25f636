// The reverse step of eager calls: without torch's dispatcher unless it has something to do (ops/direct_call.h).
#pragma once

#include "ops/library.h"

namespace ddpm_ext::eager {

Tensor reverse_step(const Tensor& x_t, const Tensor& model_output, const Tensor& table, const OptionalTensor& t,
                    int64_t t_index, double clip_min, double clip_max, const OptionalTensor& noise, bool draw_noise,
                    DDPM_RNG_PARAMETERS, const OptionalTensor& out);

// Checks these arguments of reverse_step, so that an error comes before a model is called.
void check_reverse_step(const Tensor& x_t, const Tensor& table, const OptionalTensor& t, int64_t t_index,
                        const OptionalTensor& noise, bool draw_noise, DDPM_RNG_PARAMETERS, const OptionalTensor& out);

}  // namespace ddpm_ext::eager
