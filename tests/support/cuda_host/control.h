// What a test sets and asks of the stand-in.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include <optional>
#include <vector>

#include "standin/vector_types.h"

namespace standin {

struct Launch {
  dim3 grid, block;
};

struct Control {
  uint64_t seed = 0;  // of the order in which threads and blocks take turns
  // Only these blocks of a grid run, numbered with x fastest. None of them: launches are noted, nothing runs.
  std::optional<std::vector<uint64_t>> blocks;
  bool refuse = false;  // every launch is an error
  int seconds = 30;     // of a processor's time that a launch may take
  std::vector<Launch> launches;
};

inline Control control;

// Under AddressSanitizer: no instrumented code may touch these bytes. Else nothing.
void poison(void* p, size_t size);
void unpoison(void* p, size_t size);

}  // namespace standin
