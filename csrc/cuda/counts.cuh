// The counters of a launch whose blocks add up together. Each block that has finished its part adds one, so the block
// that brings the count to the number of blocks knows that it is the last: see comes_last in sums.cuh.
#pragma once

#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGraphsC10Utils.h>

#include <algorithm>
#include <cstdint>
#include <map>
#include <mutex>
#include <utility>

namespace ddpm_ext::cuda {

// `count` counters on a device for one launch on `stream`. They are zeros when the launch begins, and its blocks set
// them back to zero, so that the next launch can use them as they are.
//
// The launches of a stream run one after the other, so they share one buffer. A launch that is captured in a CUDA graph
// gets memory of its own, which the graph clears at each replay: several graphs may run at the same time.
//
// A shared buffer is never freed, even after a larger one has taken its place, since another thread may have read its
// address and not yet launched. It is allocated by cudaMalloc and not by torch's allocator: while torch.compile warms
// up for a capture, torch's allocator takes memory from the graph's pool, which other tensors use later.
class Counts {
 public:
  Counts(int64_t count, int device, cudaStream_t stream) {
    if (c10::cuda::currentStreamCaptureStatusMayInitCtx() != c10::cuda::CaptureStatus::None) {
      own_ = c10::cuda::CUDACachingAllocator::raw_alloc_with_stream(bytes_of(count), stream);
      data_ = cleared(own_, count, stream);
      return;
    }
    struct Buffer {
      uint32_t* data = nullptr;
      int64_t count = 0;
    };
    static std::mutex mutex;
    // Never destroyed: at the end of the process CUDA may be gone before static objects are.
    static auto& buffers = *new std::map<std::pair<int, cudaStream_t>, Buffer>;
    const std::lock_guard<std::mutex> lock(mutex);
    Buffer& buffer = buffers[{device, stream}];
    if (buffer.count < count) {
      const int64_t enough = std::max(2 * count, kLeast);
      buffer = {cleared(allocate(enough), enough, stream), enough};
    }
    data_ = buffer.data;
  }
  ~Counts() {
    if (own_ != nullptr) c10::cuda::CUDACachingAllocator::raw_delete(own_);
  }
  Counts(const Counts&) = delete;

  uint32_t* data() const { return data_; }

 private:
  static constexpr int64_t kLeast = 4096;

  static size_t bytes_of(int64_t count) { return static_cast<size_t>(count) * sizeof(uint32_t); }

  // Allocates on the current device. If there is not enough memory, torch's allocator frees the blocks that it holds
  // for later, and the allocation is tried again.
  static void* allocate(int64_t count) {
    // In any other mode cudaMalloc fails while another thread captures a graph.
    const c10::cuda::CUDAStreamCaptureModeGuard relaxed(cudaStreamCaptureModeRelaxed);
    void* data = nullptr;
    if (cudaMalloc(&data, bytes_of(count)) == cudaSuccess) return data;
    cudaGetLastError();  // clears the error
    c10::cuda::CUDACachingAllocator::emptyCache();
    C10_CUDA_CHECK(cudaMalloc(&data, bytes_of(count)));
    return data;
  }

  static uint32_t* cleared(void* data, int64_t count, cudaStream_t stream) {
    C10_CUDA_CHECK(cudaMemsetAsync(data, 0, bytes_of(count), stream));
    return static_cast<uint32_t*>(data);
  }

  void* own_ = nullptr;
  uint32_t* data_ = nullptr;
};

}  // namespace ddpm_ext::cuda
