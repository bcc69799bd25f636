// The operators over whole tensors on the CPU. The arguments have been checked.
#pragma once

#include "cpu/kernel_table.h"

namespace ddpm_ext::cpu {

void reverse_step(const ElementwiseCall& call);
void extended_step(const StepCall<ExtendedStep>& call);
void linear_step(const StepCall<LinearStep>& call);
void affine(const ElementwiseCall& call);
void loss(const LossCall& call);
void randn(const ElementwiseCall& call);

const Kernels& kernels();       // those of the instruction set in use
const char* instruction_set();  // as in DDPM_EXT_CPU

}  // namespace ddpm_ext::cpu
