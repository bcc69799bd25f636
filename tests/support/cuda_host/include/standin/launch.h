// Launches of kernels, and CUDA's functions for devices, memory and errors. A launch returns after its kernel has
// ended, and returns the kernel's error, if it had one.
#pragma once

#include <stddef.h>
#include <string.h>

#include <utility>

#include "standin/vector_types.h"

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorMemoryAllocation = 2,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorIllegalAddress = 700,
  cudaErrorLaunchTimeout = 702,
  cudaErrorLaunchFailure = 719,
};
using cudaStream_t = struct CUstream_st*;
enum cudaStreamCaptureMode { cudaStreamCaptureModeRelaxed };

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount };

namespace standin {

inline int current_device = 0;

// Records a launch, a memset, or an allocation by torch's allocator: its stream and the current device.
void note_stream(cudaStream_t stream);

}  // namespace standin

cudaError_t cudaGetLastError();
const char* cudaGetErrorString(cudaError_t error);  // describes the last error

cudaError_t cudaMalloc(void** p, size_t bytes);
inline cudaError_t cudaMemsetAsync(void* p, int value, size_t bytes, cudaStream_t stream) {
  standin::note_stream(stream);
  memset(p, value, bytes);
  return cudaSuccess;
}
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);

// On every device, a multiprocessor runs at most 1,024 threads at once, and as many blocks as these threads allow.
template <class Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel, int threads, size_t) {
  *blocks = 1024 / threads;
  return cudaSuccess;
}

namespace standin {

// Calls call(kernel) once for every thread of the grid, or of the blocks that control.blocks names (control.h).
cudaError_t launch(const cudaLaunchConfig_t& config, void (*call)(void*), void* kernel);

}  // namespace standin

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), Arguments&&... args) {
  return [&](Parameters... parameters) {
    auto thread = [&] { kernel(parameters...); };
    return standin::launch(*config, [](void* t) { (*static_cast<decltype(thread)*>(t))(); }, &thread);
  }(std::forward<Arguments>(args)...);
}
