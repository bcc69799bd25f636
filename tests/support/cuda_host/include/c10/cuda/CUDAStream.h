#pragma once

#include <stdint.h>

#include "c10/cuda/CUDAGraphsC10Utils.h"

namespace c10 {
using DeviceIndex = int8_t;
}

namespace c10::cuda {

struct CUDAStream {
  cudaStream_t stream() const { return standin::external; }
  int64_t id() const { return reinterpret_cast<int64_t>(standin::external); }
};

inline CUDAStream getCurrentCUDAStream(DeviceIndex) { return {}; }

}  // namespace c10::cuda
