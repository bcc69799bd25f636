#include "probe.h"

#include <cmath>
#include <map>

#include "core/box_muller.h"
#include "cuda/elementwise.cuh"

namespace probe {
namespace {

constexpr unsigned kThreads = 1024;

__global__ void take_numbers(int* counter, int* numbers) { numbers[threadIdx.x] = atomicAdd(counter, 1); }

// Small kernels for run_kernel: correct ones, and ones with a single error.

__global__ void early_return() {
  if (threadIdx.x % 3 == 0) return;
  __syncthreads();
}
__global__ void two_barriers() {
  if (threadIdx.x % 2 == 0)
    __syncthreads();
  else
    __syncthreads();
}
__global__ void half_a_warp() {
  if (threadIdx.x % warpSize < 16) __syncwarp();
}
__global__ void stranger_in_warp() { __syncwarp(1); }
__global__ void shuffle_from_outside() {
  if (threadIdx.x < 16) __shfl_down_sync(0xffff, 1, 1, 32);
}
__global__ void null_pointer(int* p) { p[threadIdx.x] = 1; }
__global__ void misaligned(char* p) { *reinterpret_cast<float4*>(p + 4 * threadIdx.x) = make_float4(1, 2, 3, 4); }
__global__ void out_of_bounds(int* p) {
  int local[8] = {};
  local[threadIdx.x % 9] = 1;
  for (int v : local) *p += v;
}
__global__ void endless() {
  for (volatile int i = 0;;) i = static_cast<int>(threadIdx.x);
}
__global__ void nothing() {}

template <class... Parameters, class... Arguments>
void launch(unsigned blocks, unsigned threads, void (*kernel)(Parameters...), Arguments... arguments) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(threads);
  ddpm_ext::cuda::check(cudaLaunchKernelEx(&config, kernel, arguments...));
}

}  // namespace

float radius(uint32_t w) { return ddpm_ext::radius(ddpm_ext::cuda::U2(w)).v.x; }

std::vector<int64_t> roots_from_every_start() {
  int64_t starts = 0, wrong = 0, near = 0, near_wrong = 0;
  const double allowed = std::exp2(-22.9), least = std::exp2(-23.3);
  for (uint32_t bits = ddpm_ext::float_to_bits(1.0f); bits < ddpm_ext::float_to_bits(4.0f); ++bits) {
    const float x = ddpm_ext::bits_to_float(bits), expected = std::sqrt(x);
    const double exact = 1 / std::sqrt(static_cast<double>(x));
    for (uint32_t start = ddpm_ext::float_to_bits(static_cast<float>(exact)) - 5, i = 0; i <= 10; ++i) {
      const float y = ddpm_ext::bits_to_float(start + i);
      const double error = std::fabs(y / exact - 1);
      if (error > allowed) continue;
      const bool ok = ddpm_ext::cuda::newton_root(ddpm_ext::cuda::F2(x), ddpm_ext::cuda::F2(y)).v.x == expected;
      ++starts, wrong += !ok;
      if (error <= least) ++near, near_wrong += !ok;
    }
  }
  return {starts, wrong, near, near_wrong};
}

std::vector<int> order_of_threads(unsigned threads) {
  int counter = 0;
  std::vector<int> numbers(threads);
  launch(1, threads, take_numbers, &counter, numbers.data());
  return numbers;
}

void run_kernel(const std::string& name, unsigned blocks, unsigned threads) {
  static const std::map<std::string, void (*)()> kernels = {
      {"early_return", early_return},
      {"two_barriers", two_barriers},
      {"half_a_warp", half_a_warp},
      {"stranger_in_warp", stranger_in_warp},
      {"shuffle_from_outside", shuffle_from_outside},
      {"endless", endless},
      {"nothing", nothing},
  };
  alignas(16) int memory[4 * kThreads + 4] = {};
  if (name == "null_pointer") return launch(blocks, threads, null_pointer, static_cast<int*>(nullptr));
  if (name == "misaligned") return launch(blocks, threads, misaligned, reinterpret_cast<char*>(memory));
  if (name == "out_of_bounds") return launch(blocks, threads, out_of_bounds, memory);
  launch(blocks, threads, kernels.at(name));
}

}  // namespace probe
