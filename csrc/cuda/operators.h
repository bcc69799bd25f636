// The operators over whole tensors on a GPU, on its current stream. The arguments have been checked.
#pragma once

#include "call.h"

namespace ddpm_ext::cuda {

void reverse_step(const ReverseStepCall& call, int device);
void step_with_options(const StepCall& call, int device);
void affine(const ElementwiseCall& call, int device);
void loss(const LossCall& call, int device);
void output_scale(const OutputScaleCall& call, int device);
void x_start_scale(const XStartScaleCall& call, int device);
int64_t x_start_scale_scratch(int64_t batch, int64_t numel);  // floats
void randn(const ElementwiseCall& call, int device);

}  // namespace ddpm_ext::cuda
