// The operators over whole tensors on the CPU. The caller has checked the arguments.
#pragma once

#include "cpu/kernel_table.h"

namespace ddpm_ext::cpu {

void reverse_step(const ReverseStepCall& call);
void step_with_options(const StepCall& call);
void affine(const ElementwiseCall& call);
void loss(const LossCall& call);
void output_scale(const OutputScaleCall& call);
void x_start_scale(const XStartScaleCall& call);
int64_t x_start_scale_scratch(int64_t batch, int64_t numel);  // the size of x_start_scale's scratch memory, in floats
void randn(const ElementwiseCall& call);

const Kernels& kernels();       // the kernels of the instruction set in use
const char* instruction_set();  // the name of that set, such as "avx2"

}  // namespace ddpm_ext::cpu
