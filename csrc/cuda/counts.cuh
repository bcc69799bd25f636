// Counts by which a launch's blocks learn which of them is the last.
#pragma once

#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGraphsC10Utils.h>
#include <cstdint>
#include <map>
#include <mutex>
#include <utility>

namespace ddpm_ext::cuda {

// Zeros on a device for one launch on its current stream, which leaves them as zeros. A stream's launches come one
// after the other, so they share a buffer and only the first one clears it. A launch that is captured has zeros of its
// own, since graphs may run side by side.
class Counts {
 public:
  Counts(int64_t count, int device, cudaStream_t stream) {
    if (c10::cuda::currentStreamCaptureStatusMayInitCtx() != c10::cuda::CaptureStatus::None) {
      own_ = data_ = zeros(count, stream);
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
      if (buffer.data != nullptr) c10::cuda::CUDACachingAllocator::raw_delete(buffer.data);
      buffer = {};
      buffer = {zeros(2 * count, stream), 2 * count};
    }
    data_ = buffer.data;
  }
  ~Counts() {
    if (own_ != nullptr) c10::cuda::CUDACachingAllocator::raw_delete(own_);
  }
  Counts(const Counts&) = delete;

  uint32_t* data() const { return data_; }

 private:
  static uint32_t* zeros(int64_t count, cudaStream_t stream) {
    const size_t bytes = static_cast<size_t>(count) * sizeof(uint32_t);
    void* const data = c10::cuda::CUDACachingAllocator::raw_alloc_with_stream(bytes, stream);
    C10_CUDA_CHECK(cudaMemsetAsync(data, 0, bytes, stream));
    return static_cast<uint32_t*>(data);
  }

  uint32_t* own_ = nullptr;
  uint32_t* data_ = nullptr;
};

}  // namespace ddpm_ext::cuda
