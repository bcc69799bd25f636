#include <ATen/CPUGeneratorImpl.h>

#include <algorithm>
#include <mutex>

#include "ops/checks.h"
#include "ops/fill_call.h"
#include "ops/operators.h"
#include "ops/result_memory.h"
#include "ops/run_on_device.h"

namespace ddpm_ext {

Tensor randn(at::IntArrayRef size, const Rng& rng, at::ScalarType dtype, at::Device device) {
  constexpr const char* op = "randn";
  ElementwiseCall call;
  call.out.dtype = dtype_of(op, "dtype", dtype);
  check_device(op, "device", device);
  CHECK_VALUE(!size.empty(), "shape", " is empty, expected (batch, ...)");
  call.batch = size[0];
  call.noise_kind = Noise::drawn;
  const Tensor result = empty_result(size, at::TensorOptions().dtype(dtype).device(device));
  set_rng(op, call, rng, result.device());  // result.device(): a plain "cuda" has no index
  call.draw = std::max<int64_t>(call.draw, 0);
  bind(op, call, Order::logical, {}, result, call.out);
  DDPM_RUN(randn, call, result.device());
  return result;
}

int64_t draw_seed() {
  at::Generator generator = at::detail::getDefaultCPUGenerator();
  const std::lock_guard<std::mutex> lock(generator.mutex());
  return static_cast<int64_t>(at::check_generator<at::CPUGeneratorImpl>(generator)->random64());
}

}  // namespace ddpm_ext
