// The settings of the stand-in that a test may change, and what it recorded.
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

// What a launch, an allocation or a memset was put on.
struct Work {
  cudaStream_t stream;
  int device;
};

// The multiprocessors of the devices: of a large GPU, and of one so small that tensors of a test are large for it.
constexpr int kMultiprocessors[] = {132, 2};

// What the accesses of warps touched, in sectors of 32 bytes; a sector counts once for each access.
struct Sectors {
  int64_t loaded = 0, stored = 0;
};

struct Control {
  uint64_t seed = 0;  // decides the order in which threads and blocks take turns
  // If set, only these blocks of a grid run, numbered with x fastest. With an empty list launches are recorded but
  // nothing runs.
  std::optional<std::vector<uint64_t>> blocks;
  bool refuse = false;  // makes every launch an error
  int full = 0;         // how many of the next cudaMalloc find no memory
  int seconds = 30;     // of processor time that a launch may take
  int device = 0;       // which has the tensors of a call, whichever is current
  bool counts_sectors = false;
  Sectors sectors;
  std::vector<Launch> launches;
  std::vector<Work> works;
};

inline Control control;

// Counts in control.sectors what the threads of the block that has ended noted, if control.counts_sectors is set. The
// n-th loads of a warp's threads are one access, and so are the n-th stores.
void count_sectors();

// Under AddressSanitizer, forbids instrumented code to touch these bytes, or allows it again. Without it, does nothing.
void poison(void* p, size_t size);
void unpoison(void* p, size_t size);

}  // namespace standin
