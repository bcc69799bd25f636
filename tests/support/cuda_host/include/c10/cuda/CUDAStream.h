#pragma once

#include <stdint.h>

#include "standin/launch.h"

namespace standin {

// The kind of the current streams. null: default streams, whose handle is null on every device. of_torch: other streams
// that torch has created. external: streams that torch has not created.
enum class Streams : int { null, of_torch, external };
inline Streams streams = Streams::null;

inline cudaStream_t current_stream(int device) {
  return streams == Streams::null ? nullptr : reinterpret_cast<cudaStream_t>(intptr_t{16} * (device + 1));
}

}  // namespace standin

namespace c10 {
using DeviceIndex = int8_t;
}

namespace c10::cuda {

// A stream of torch. The id of a stream that torch has not created is its handle, and the id of a default stream is 0.
class CUDAStream {
 public:
  explicit CUDAStream(cudaStream_t stream) : stream_(stream) {}
  cudaStream_t stream() const { return stream_; }
  int64_t id() const { return standin::streams == standin::Streams::of_torch ? 1 : reinterpret_cast<int64_t>(stream_); }

 private:
  cudaStream_t stream_;
};

inline CUDAStream getCurrentCUDAStream(DeviceIndex device) { return CUDAStream(standin::current_stream(device)); }

}  // namespace c10::cuda
