#include "cuda/reverse_step.cuh"

#include "cuda/operators.h"

namespace ddpm_ext::cuda {

void reverse_step(const ElementwiseCall& call, int device) {
  on_device(device, [&](cudaStream_t stream) {
    by_dtypes(call.x.dtype, call.model_output.dtype,
              [&](auto x, auto m) { launch_noise<ReverseStep, decltype(x), decltype(m), decltype(x)>(call, stream); });
  });
}

}  // namespace ddpm_ext::cuda
