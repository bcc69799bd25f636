// Counts by which a launch's blocks learn which of them is the last.
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

// Zeros on a device for one launch on its current stream, which leaves them as zeros. A stream's launches come one
// after the other, so they share a buffer and only the first one clears it. A launch that is captured has zeros of its
// own, since graphs may run side by side.
//
// Buffers stay until the process ends, also those that were outgrown, since another thread may be about to launch with
// one. So they are no memory of torch's allocator: before torch.compile captures a graph, that draws from the graph's
// pool, whose memory is given to others later.
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
    static auto& buffers = *new std::map<std::pair<int, cudaStream_t>, Buffer>;  // it may outlive CUDA
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

  // Memory on the current device. If there is none, torch's allocator gives back what it holds unused.
  static void* allocate(int64_t count) {
    const c10::cuda::CUDAStreamCaptureModeGuard relaxed(cudaStreamCaptureModeRelaxed);  // others may be capturing
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
