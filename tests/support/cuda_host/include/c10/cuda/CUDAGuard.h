#pragma once

#include <stdint.h>

namespace c10 {
using DeviceIndex = int8_t;
}

namespace c10::cuda {

struct CUDAGuard {
  explicit CUDAGuard(DeviceIndex) {}
};

}  // namespace c10::cuda
