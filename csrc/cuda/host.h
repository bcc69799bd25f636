// What launches need of torch, without torch's headers: nvcc would read those once for each file and architecture,
// which takes longer than most kernels.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace ddpm_ext::cuda {

// Raises torch's error for a call of CUDA's that failed.
void check(cudaError_t error);

// Makes the device current and calls launch(of, stream) with its current stream.
void on_device(int device, void (*launch)(void* of, cudaStream_t stream), void* of);

// The counters of a launch whose blocks add up together. Each block that has finished its part adds one, so the block
// that brings the count to the number of blocks knows that it is the last: see comes_last in sums.cuh.
//
// `count` counters on a device for a launch on `stream`, or for some one after another. They are zeros when a launch
// begins, and its blocks set them back to zero, so that the next launch can use them as they are.
//
// The launches of a stream of torch's run one after the other, so they share one buffer. A launch on any other stream
// gets memory of its own, since a handle does not tell such streams apart: cudaStreamPerThread stands for one in each
// thread, and the handle of a destroyed stream is given to a new one. So does a launch that is captured in a CUDA
// graph, which clears it at each replay: several graphs may run at the same time.
//
// A shared buffer is never freed, even after a larger one has taken its place, since another thread may have read its
// address and not yet launched. It is allocated by cudaMalloc and not by torch's allocator: while torch.compile warms
// up for a capture, torch's allocator takes memory from the graph's pool, which other tensors use later.
class Counts {
 public:
  Counts(int64_t count, int device, cudaStream_t stream);
  ~Counts();
  Counts(const Counts&) = delete;

  uint32_t* data() const { return data_; }

 private:
  void* own_ = nullptr;
  uint32_t* data_ = nullptr;
};

}  // namespace ddpm_ext::cuda
