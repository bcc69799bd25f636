// The operators over whole tensors on the CPU. Arguments are checked already.
#pragma once

#include "cpu/kernels.h"

namespace ddpm_ext::cpu {

void reverse_step(const Args& args);
void extended_step(const ExtendedArgs& args);
void affine(const Args& args);
void loss(const LossArgs& args);
void randn(const Args& args);

const Kernels& kernels();       // of the instruction set in use
const char* instruction_set();  // its name: "avx512", "avx2", "portable"

}  // namespace ddpm_ext::cpu
