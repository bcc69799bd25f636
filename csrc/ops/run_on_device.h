// Runs a call by the kernels of the device that its tensors are on.
#pragma once

#include <ATen/core/Tensor.h>

#include "cpu/operators.h"
#include "ops/operators.h"
#ifdef DDPM_EXT_WITH_CUDA
#include "cuda/operators.h"
#endif

namespace ddpm_ext {

// Runs a call on its device; there is nothing to run for an empty tensor.
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

// Returns the result. If it is a given output, autograd learns that it has changed.
inline Tensor finish(const Tensor& result, const OptionalTensor& out) {
  if (out.has_value() && !result.is_inference()) result.unsafeGetTensorImpl()->bump_version();
  return result;
}

}  // namespace ddpm_ext
