#include "cuda/operators.h"
#include "cuda/steps_with_options.cuh"

namespace ddpm_ext::cuda {

void extended_step(const StepCall<ExtendedStep>& call, int device) { step_with_options(call, device); }

}  // namespace ddpm_ext::cuda
