#include "cuda/host.h"

#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGraphsC10Utils.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <algorithm>
#include <map>
#include <mutex>
#include <utility>

namespace ddpm_ext::cuda {
namespace {

constexpr int64_t kLeastCounters = 4096;  // the fewest counters of a buffer that a stream's launches share

size_t bytes_of(int64_t count) { return static_cast<size_t>(count) * sizeof(uint32_t); }

// Allocates `count` counters on the current device. If there is not enough memory, torch's allocator frees its unused
// cached memory, and the allocation is tried a second time.
void* allocate(int64_t count) {
  // In the global mode, the default, cudaMalloc fails while another thread captures a graph in that mode. The relaxed
  // mode allows it.
  const c10::cuda::CUDAStreamCaptureModeGuard relaxed(cudaStreamCaptureModeRelaxed);
  void* data = nullptr;
  if (cudaMalloc(&data, bytes_of(count)) == cudaSuccess) return data;
  cudaGetLastError();  // clears the error
  c10::cuda::CUDACachingAllocator::emptyCache();
  check(cudaMalloc(&data, bytes_of(count)));
  return data;
}

// Sets `count` counters to zero, on the stream. Returns them.
uint32_t* cleared(void* data, int64_t count, cudaStream_t stream) {
  check(cudaMemsetAsync(data, 0, bytes_of(count), stream));
  return static_cast<uint32_t*>(data);
}

// Whether the stream is the default stream, or a stream that torch created. For any other stream, torch uses the handle
// as the id.
bool made_by_torch(const c10::cuda::CUDAStream& stream) {
  return stream.stream() == nullptr || stream.id() != reinterpret_cast<int64_t>(stream.stream());
}

}  // namespace

void check(cudaError_t error) { C10_CUDA_CHECK(error); }

void on_device(int device, void (*launch)(void* closure, cudaStream_t stream), void* closure) {
  const c10::cuda::CUDAGuard guard(static_cast<c10::DeviceIndex>(device));
  launch(closure, c10::cuda::getCurrentCUDAStream(static_cast<c10::DeviceIndex>(device)).stream());
}

Counts::Counts(int64_t count, int device, cudaStream_t stream) {
  const bool captured = c10::cuda::currentStreamCaptureStatusMayInitCtx() != c10::cuda::CaptureStatus::None;
  if (captured || !made_by_torch(c10::cuda::getCurrentCUDAStream(static_cast<c10::DeviceIndex>(device)))) {
    launch_memory_ = c10::cuda::CUDACachingAllocator::raw_alloc_with_stream(bytes_of(count), stream);
    data_ = cleared(launch_memory_, count, stream);
    return;
  }
  struct Buffer {
    uint32_t* data = nullptr;
    int64_t count = 0;
  };
  static std::mutex mutex;
  // The map is never destroyed: another thread may still launch kernels while the process destroys static objects.
  static auto& buffers = *new std::map<std::pair<int, cudaStream_t>, Buffer>;
  const std::lock_guard<std::mutex> lock(mutex);
  Buffer& buffer = buffers[{device, stream}];
  if (buffer.count < count) {
    const int64_t enough = std::max(2 * count, kLeastCounters);
    buffer = {cleared(allocate(enough), enough, stream), enough};
  }
  data_ = buffer.data;
}

Counts::~Counts() {
  if (launch_memory_ != nullptr) c10::cuda::CUDACachingAllocator::raw_delete(launch_memory_);
}

}  // namespace ddpm_ext::cuda
