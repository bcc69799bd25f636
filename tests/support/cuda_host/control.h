// The settings of the stand-in that tests may change, and what it records.
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

// The stream and the device of a launch, an allocation or a memset.
struct Work {
  cudaStream_t stream;
  int device;
};

// The devices' numbers of multiprocessors. Device 0 is a large GPU. Device 1 is so small that a test's tensors are
// large for it.
constexpr int kMultiprocessors[] = {132, 2};

// The sectors of 32 bytes that the warps' accesses touched. A sector counts once for each access.
struct Sectors {
  int64_t loaded = 0, stored = 0;
};

struct Control {
  uint64_t seed = 0;  // decides the order in which threads and blocks run
  // If set, only these blocks of a grid run, numbered with x fastest. With an empty list, launches are recorded but
  // nothing runs.
  std::optional<std::vector<uint64_t>> blocks;
  bool refuse = false;  // makes every launch an error
  int full = 0;         // the number of next cudaMalloc calls that fail
  int seconds = 30;     // of processor time, the limit of a launch
  int device = 0;       // of the tensors of a call, independent of the current one
  bool counts_sectors = false;
  Sectors sectors;
  std::vector<Launch> launches;
  std::vector<Work> works;
};

inline Control control;

// Adds the accesses noted by the threads of the block that has just ended to control.sectors, if control.counts_sectors
// is set. The n-th loads of a warp's threads count as one access, and so do the n-th stores.
void count_sectors();

// Under AddressSanitizer, forbids instrumented code to access these bytes, or allows it again. Otherwise does nothing.
void poison(void* p, size_t size);
void unpoison(void* p, size_t size);

}  // namespace standin
