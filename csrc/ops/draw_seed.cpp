#include <ATen/CPUGeneratorImpl.h>

#include <mutex>

#include "ops/operators.h"

namespace ddpm_ext {

int64_t draw_seed() {
  at::Generator generator = at::detail::getDefaultCPUGenerator();
  const std::lock_guard<std::mutex> lock(generator.mutex());
  return static_cast<int64_t>(at::check_generator<at::CPUGeneratorImpl>(generator)->random64());
}

}  // namespace ddpm_ext
