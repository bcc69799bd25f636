// Helpers of every launch: the shape of the grid, the C++ types of the tensors, the device and its stream.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <atomic>

#include "call.h"
#include "cuda/host.h"

namespace ddpm_ext::cuda {

constexpr int kThreads = 256;  // the most threads of a block

constexpr int64_t kMaxGridY = 65535;  // CUDA's limit of a grid's y dimension

// The number of blocks in a grid, and the number of threads in a block, in three dimensions.
struct Shape {
  dim3 grid, block;
};

// The number of multiprocessors of the current device, and the number of blocks of a kernel that the device runs at
// once.
struct Room {
  int multiprocessors, blocks;
};

// Returns the Room of a kernel with blocks of `threads` threads. Caches it for each kernel on the first kDevices
// devices.
template <auto kKernel>
Room room_for(int threads) {
  constexpr int kDevices = 64;
  static std::atomic<Room> cached[kDevices];
  int device = 0;
  check(cudaGetDevice(&device));
  Room room = device < kDevices ? cached[device].load(std::memory_order_relaxed) : Room{};
  if (room.blocks == 0) {
    int per_multiprocessor = 0;
    check(cudaDeviceGetAttribute(&room.multiprocessors, cudaDevAttrMultiProcessorCount, device));
    check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_multiprocessor, kKernel, threads, 0));
    room.blocks = std::max(room.multiprocessors * per_multiprocessor, 1);
    if (device < kDevices) cached[device].store(room, std::memory_order_relaxed);
  }
  return room;
}

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline unsigned unsigned_int(int64_t n) { return static_cast<unsigned>(n); }

// Returns the shape of a launch in which a thread takes `items` elements of a sample in a turn (loop iteration). A
// block covers a stretch of one sample, or several small samples. It has kThreads threads, or fewer if some
// multiprocessors would otherwise have no block. If single turns would need at least four times as many blocks as the
// device runs at once (`at_once`), each thread takes several turns, at most kMaxTurns, so that the sample's row and
// factors are read less often. If one block covers a whole sample, a thread takes only one turn.
inline Shape launch_shape(int64_t batch, int64_t numel, int items, int64_t multiprocessors, int64_t at_once) {
  constexpr int64_t kMaxTurns = 8, kLeastThreads = 64;
  const int64_t threads = divide_up(numel, items);  // for one sample
  int64_t block = kThreads, along, samples, rows, columns;
  for (;; block /= 2) {
    for (along = 1; along < block && along < threads;) along *= 2;
    samples = block / along, rows = divide_up(batch, samples), columns = divide_up(threads, along);
    if (block == kLeastThreads || columns * rows >= multiprocessors) break;
  }
  const int64_t turns = std::clamp<int64_t>(columns * rows / (2 * at_once), 1, kMaxTurns);
  return {dim3(unsigned_int(divide_up(columns, turns)), unsigned_int(std::min(rows, kMaxGridY)),
               unsigned_int(divide_up(rows, kMaxGridY))),
          dim3(unsigned_int(along), unsigned_int(samples))};
}

// Returns the shape of a launch in which each block belongs to one sample. A sample has at most `most` blocks. In all,
// the samples have about twice as many blocks as the device runs at once (`at_once`), but at least one block each.
inline Shape shape_of_samples(int64_t batch, int64_t most, int threads, int64_t at_once) {
  const int64_t blocks = std::min(divide_up(2 * at_once, batch), most), rows = std::min(batch, kMaxGridY);
  return {dim3(unsigned_int(blocks), unsigned_int(rows), unsigned_int(divide_up(batch, rows))),
          dim3(unsigned_int(threads))};
}

// Launches a kernel on a grid.
template <auto kKernel, class... Arguments>
void launch_on(const Shape& shape, cudaStream_t stream, const Arguments&... arguments) {
  cudaLaunchConfig_t config = {};
  config.gridDim = shape.grid;
  config.blockDim = shape.block;
  config.stream = stream;
  check(cudaLaunchKernelEx(&config, kKernel, arguments...));
}

// Calls launch(a, b), where a has the C++ type of the dtype x, and b that of the dtype m. Only the types of a and b
// matter. m is the dtype of the second tensor, such as the model's output. If x is a 16-bit dtype, m is not read, and b
// has the type of a.
template <class Launch>
void by_dtypes(DType x, DType m, Launch launch) {
  switch (x) {
    case DType::float16:
      return launch(__half(), __half());
    case DType::bfloat16:
      return launch(__nv_bfloat16(), __nv_bfloat16());
    case DType::float32:
      switch (m) {
        case DType::float32:
          return launch(float(), float());
        case DType::float16:
          return launch(float(), __half());
        case DType::bfloat16:
          return launch(float(), __nv_bfloat16());
      }
  }
}

// Makes `device` the current device and calls launch(stream) with its current stream.
template <class Launch>
void on_device(int device, Launch launch) {
  on_device(device, [](void* closure, cudaStream_t stream) { (*static_cast<Launch*>(closure))(stream); }, &launch);
}

}  // namespace ddpm_ext::cuda
