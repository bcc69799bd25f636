// The training loss with its CUDA kernel, as in module.cpp.
#include "cpu/operators.h"
#include "cuda/operators.h"

namespace ddpm_ext::cpu {

void loss(const LossCall& call) { cuda::loss(call, 0); }

}  // namespace ddpm_ext::cpu
