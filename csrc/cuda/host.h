// What launches need from torch, without torch's headers: nvcc would read those once for each file and architecture,
// which takes longer than compiling most kernels.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace ddpm_ext::cuda {

// Raises torch's error if a CUDA call failed.
void check(cudaError_t error);

// Makes the device current and calls launch(closure, stream) with the device's current stream.
void on_device(int device, void (*launch)(void* closure, cudaStream_t stream), void* closure);

// The counters of a launch whose blocks add up a result together. Each block that has finished its part adds one. The
// block that brings the count to the number of blocks knows that it is the last one: see comes_last in sums.cuh.
//
// An object has `count` counters on a device, for a launch on `stream` or for several launches one after the other. The
// counters are zero when a launch begins. Its blocks set them back to zero, so that the next launch can use them.
//
// Launches on one of torch's streams run one after the other, so they share one buffer. A launch on any other stream
// gets its own memory, because such streams cannot be told apart by their handles: cudaStreamPerThread stands for a
// different stream in each thread, and a new stream may get the handle of a destroyed one. A launch that is captured in
// a CUDA graph also gets its own memory, which the graph clears at each replay: several graphs may run at the same
// time.
//
// A shared buffer is never freed, even after a larger one has replaced it: another thread may have read its address and
// not yet launched. It is allocated by cudaMalloc, not by torch's allocator. While torch.compile warms up for a
// capture, torch's allocator takes memory from the graph's pool, which other tensors use later.
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
