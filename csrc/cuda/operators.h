// The operators over whole tensors on the GPU with number `device`, on its current stream. The caller has checked the
// arguments.
#pragma once

#include "call.h"

namespace ddpm_ext::cuda {

void reverse_step(const ReverseStepCall& call, int device);
void step_with_options(const StepCall& call, int device);
void affine(const ElementwiseCall& call, int device);
void loss(const LossCall& call, int device);
void output_scale(const OutputScaleCall& call, int device);
void x_start_scale(const XStartScaleCall& call, int device);
int64_t x_start_scale_scratch(int64_t batch, int64_t numel);  // the size of x_start_scale's scratch memory, in floats
void randn(const ElementwiseCall& call, int device);

}  // namespace ddpm_ext::cuda
