#pragma once

#include <stdint.h>

#include <utility>

#include "standin/launch.h"

namespace c10 {
using DeviceIndex = int8_t;
}

namespace c10::cuda {

class CUDAGuard {
 public:
  explicit CUDAGuard(DeviceIndex device) : before_(std::exchange(standin::current_device, device)) {}
  ~CUDAGuard() { standin::current_device = before_; }
  CUDAGuard(const CUDAGuard&) = delete;

 private:
  int before_;
};

}  // namespace c10::cuda
