// Adds up a sample in the order that core/loss.h describes. Several blocks add up the chunks of a sample, and the last
// block to finish adds up the sums of the chunks.
#pragma once

#include <cstdint>

#include "core/loss.h"

namespace ddpm_ext::cuda {

// The threads of a block, which processes one or two chunks at a time: a thread takes four elements of a chunk.
constexpr int kLossThreads = kLossChunk / 4;
static_assert(kLossThreads == kLossStrands && kLossLanes == 2 * 32);

// Adds up the values of a chunk. All lanes of a warp call this, and the first lane gets the sum.
__device__ __forceinline__ double sum_of_lanes(const float* values) {
  float lanes[2] = {0.0f, 0.0f};
  DDPM_UNROLL
  for (int i = 0; i < kLossChunk; i += kLossLanes) {
    lanes[0] += values[i + threadIdx.x % 32];
    lanes[1] += values[i + 32 + threadIdx.x % 32];
  }
  double sum = static_cast<double>(lanes[0]) + static_cast<double>(lanes[1]);
  DDPM_UNROLL
  for (int h = 16; h > 0; h /= 2) sum += __shfl_down_sync(0xffffffffu, sum, h);
  return sum;
}

// Reads a number that another block wrote, after comes_last. The read is volatile, since the compiler might otherwise
// move it before comes_last.
template <class T>
__device__ __forceinline__ T read_of_other_block(const T* p) {
  return *static_cast<const volatile T*>(p);
}

// Returns the sum of value(0) to value(count - 1), in strands (core/loss.h). All threads of a block call this together,
// and all get the sum. `strands` is shared memory. The last barrier is needed even if only the first thread uses the
// sum: the compiler may let the other threads read strands[0], too. Without the barrier, they could read it before the
// first thread has written it.
template <class Value>
__device__ __forceinline__ double sum_by_strands(int64_t count, Value value, double* strands) {
  double strand = 0;
  for (int64_t i = threadIdx.x; i < count; i += kLossStrands) strand += value(i);
  __syncthreads();
  strands[threadIdx.x] = strand;
  for (int h = kLossStrands / 2; h > 0; h /= 2) {
    __syncthreads();
    if (threadIdx.x < h) strands[threadIdx.x] += strands[threadIdx.x + h];
  }
  __syncthreads();
  return strands[0];
}

// Whether this block is the last of `blocks` blocks to call this. In the last block, everything that the other blocks
// wrote before their call is visible, and `count` is back at zero for the next launch. `last` is shared memory.
__device__ __forceinline__ bool comes_last(uint32_t* count, uint32_t blocks, bool& last) {
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    last = atomicInc(count, blocks - 1) == blocks - 1;
    if (last) __threadfence();
  }
  __syncthreads();
  return last;
}

}  // namespace ddpm_ext::cuda
