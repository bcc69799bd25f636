#include "cuda/operators.h"
#include "cuda/steps_with_options.cuh"

namespace ddpm_ext::cuda {

void linear_step(const StepCall<LinearStep>& call, int device) { step_with_options(call, device); }

}  // namespace ddpm_ext::cuda
