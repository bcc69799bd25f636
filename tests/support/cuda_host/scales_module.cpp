// The factors that follow from statistics with their CUDA kernels, as in module.cpp.
#include "cpu/operators.h"
#include "cuda/operators.h"

namespace ddpm_ext::cpu {

void output_scale(const OutputScaleCall& call) { cuda::output_scale(call, 0); }
void x_start_scale(const XStartScaleCall& call) { cuda::x_start_scale(call, 0); }
int64_t x_start_scale_scratch(int64_t batch, int64_t numel) { return cuda::x_start_scale_scratch(batch, numel); }

}  // namespace ddpm_ext::cpu
