// The settings of the stand-in for CUDA's runtime, which tests change, and its records of launches and memory accesses.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include <optional>
#include <vector>

#include "standin/launch.h"
#include "standin/vector_types.h"

namespace standin {

struct Launch {
  dim3 grid, block;
};

// The stream and the device of a launch, a memset, or an allocation by torch's allocator.
struct Work {
  cudaStream_t stream;
  int device;
};

// The numbers of multiprocessors of the two devices. Device 0 is like a large GPU. On device 1, small tensors already
// need more blocks than it runs at once.
constexpr int kMultiprocessors[] = {132, 2};

// The numbers of sectors (32 bytes of memory) that the loads and stores of all warps touched. Only the accesses by
// load_word, load_word_if and store_word count (cuda/ptx.cuh). A sector counts once for each access of a warp that
// touches it.
struct Sectors {
  int64_t loaded = 0, stored = 0;
};

struct Control {
  uint64_t seed = 0;  // decides the order in which threads and blocks run
  // If set, only the blocks with these numbers run. Blocks are numbered with x fastest. With an empty list, launches
  // are recorded but no block runs.
  std::optional<std::vector<uint64_t>> blocks;
  bool refuse = false;  // whether every launch fails
  int full = 0;         // how many of the next calls of cudaMalloc fail, as if memory were full
  int seconds = 30;     // the limit of a launch, in seconds of processor time
  int device = 0;       // the device of a call's tensors, which may differ from the current device
  bool counts_sectors = false;
  Sectors sectors;
  std::vector<Launch> launches;
  std::vector<Work> works;
};

inline Control control;

// Adds the sectors of the block that has just ended to control.sectors, if control.counts_sectors is set. The n-th
// loads of all threads of a warp count as one access of the warp, and so do their n-th stores.
void count_sectors();

// poison makes AddressSanitizer report accesses to these bytes, and unpoison allows them. Without AddressSanitizer,
// both do nothing.
void poison(void* p, size_t size);
void unpoison(void* p, size_t size);

}  // namespace standin
