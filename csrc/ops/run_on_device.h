// Runs a call on the CPU or on a GPU, according to the device of its tensors.
#pragma once

#include <ATen/core/Tensor.h>

#include "cpu/operators.h"
#include "ops/operators.h"
#ifdef DDPM_EXT_WITH_CUDA
#include "cuda/operators.h"
#endif

namespace ddpm_ext {

// Calls cpu(call) or cuda(call, device index), according to the device. Does nothing if there are no elements.
template <class AnyCall, class Cpu, class Cuda>
void run_on_device(const AnyCall& call, at::Device device, Cpu cpu, [[maybe_unused]] Cuda cuda) {
  if (call.batch == 0 || call.numel == 0) return;
#ifdef DDPM_EXT_WITH_CUDA
  if (device.is_cuda()) return cuda(call, device.index());
#endif
  (void)device;
  cpu(call);
}

#ifdef DDPM_EXT_WITH_CUDA
#define DDPM_RUN(function, call, device) run_on_device(call, device, cpu::function, cuda::function)
#else
#define DDPM_RUN(function, call, device) run_on_device(call, device, cpu::function, nullptr)
#endif

// Returns the result. If the caller passed `out`, increments the version of that tensor, so that autograd notices that
// it was changed in place.
inline Tensor finish(const Tensor& result, const OptionalTensor& out) {
  if (out.has_value() && !result.is_inference()) result.unsafeGetTensorImpl()->bump_version();
  return result;
}

}  // namespace ddpm_ext
