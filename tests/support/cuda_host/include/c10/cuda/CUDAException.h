#pragma once

#include <stdexcept>
#include <string>

namespace c10::cuda {

inline void check(cudaError_t error, const char* file, int line) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // clears the error
  throw std::runtime_error(std::string(file) + ":" + std::to_string(line) + ": CUDA error " + std::to_string(error) +
                           ": " + cudaGetErrorString(error));
}

}  // namespace c10::cuda

#define C10_CUDA_CHECK(expression) c10::cuda::check(expression, __FILE__, __LINE__)
