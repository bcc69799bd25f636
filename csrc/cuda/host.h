// Functions of torch that launches need, declared without torch's headers. nvcc would read those headers once for each
// file and architecture, which takes longer than compiling most kernels.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace ddpm_ext::cuda {

// Raises torch's error if a CUDA call failed.
void check(cudaError_t error);

// Makes `device` the current device and calls launch(closure, stream) with its current stream.
void on_device(int device, void (*launch)(void* closure, cudaStream_t stream), void* closure);

// Counters for a kernel that sums over blocks. Some count finished blocks: each block adds one when it has stored its
// results. The block that brings the counter to the number of blocks is the last one: comes_last in sums.cuh. Others
// are the bins of histograms, in x_start_scale.cu.
//
// An object has `count` counters on a device, for a launch on `stream` or for several launches one after the other. The
// counters are zero when a launch begins. The last block that uses a counter sets it back to zero for the next launch.
//
// Launches on the same stream run one after the other. So all launches on the default stream share one buffer, and so
// do all launches on a stream that torch created. A launch on any other stream gets separate memory, because the handle
// does not identify such a stream: cudaStreamPerThread is a different stream in each thread, and a new stream may get
// the handle of a destroyed stream.
// A launch that is captured in a CUDA graph also gets separate memory, because several graphs may run at the same time.
// The graph sets this memory to zero at each replay.
//
// A shared buffer is never freed, even after a larger buffer has replaced it: another thread may have read its address
// and not yet launched its kernel. cudaMalloc allocates it, not torch's allocator. While torch.compile warms up for a
// graph capture, torch's allocator takes memory from the graph's pool, and other tensors would use that memory later.
class Counts {
 public:
  Counts(int64_t count, int device, cudaStream_t stream);
  ~Counts();
  Counts(const Counts&) = delete;

  uint32_t* data() const { return data_; }

 private:
  void* launch_memory_ = nullptr;  // separate memory for this launch, if it does not use a shared buffer
  uint32_t* data_ = nullptr;
};

}  // namespace ddpm_ext::cuda
