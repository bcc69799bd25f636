// The indices of a kernel's thread, and its synchronisation with other threads. All threads of a launch are fibers of
// one host thread. So the variables of the running thread are global variables, and every operation is atomic.
#pragma once

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <algorithm>
#include <utility>

#include "standin/vector_types.h"

inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;
constexpr int warpSize = 32;

namespace standin {

// A position in the source code, which identifies a barrier or a shuffle.
struct Site {
  const char* file;
  int line;
};

// The barriers __syncthreads and __syncwarp.
void wait_for_block(Site site);
void wait_for_warp(unsigned mask, Site site);
// A shuffle: returns the bits that the thread `lane` of the warp passes at the same site.
uint64_t exchange(unsigned mask, uint64_t bits, int lane, Site site);
int lane();       // the running thread's lane in its warp
unsigned warp();  // the number of that warp in its block
// Records that the running thread reaches an access to global memory. `happens` says whether the condition of the
// access holds.
void note_access(bool happens, bool store, const void* p, size_t bytes);

template <class T>
T exchange_value(unsigned mask, T value, int source, Site site) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8);
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof value);
  bits = exchange(mask, bits, source, site);
  memcpy(&value, &bits, sizeof value);
  return value;
}

// Returns `source`, or the running thread's lane if `source` is after the end of that lane's group of `width` lanes.
inline int within(int source, int width) { return source <= (lane() | (width - 1)) ? source : lane(); }

}  // namespace standin

#define STANDIN_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()

inline void __syncthreads(STANDIN_SITE) { standin::wait_for_block({file, line}); }
inline void __syncwarp(unsigned mask = 0xffffffffu, STANDIN_SITE) { standin::wait_for_warp(mask, {file, line}); }

// Does nothing: only one thread runs at a time, so it sees everything that other threads have written.
inline void __threadfence() {}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = warpSize, STANDIN_SITE) {
  return standin::exchange_value(mask, value, standin::within(standin::lane() ^ lane_mask, width), {file, line});
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = warpSize, STANDIN_SITE) {
  const int source = standin::within(standin::lane() + static_cast<int>(delta), width);
  return standin::exchange_value(mask, value, source, {file, line});
}

inline int atomicAdd(int* p, int value) { return std::exchange(*p, *p + value); }
inline unsigned atomicAdd(unsigned* p, unsigned value) { return std::exchange(*p, *p + value); }
inline unsigned atomicMin(unsigned* p, unsigned value) { return std::exchange(*p, std::min(*p, value)); }

// Increments *p, where 0 follows `last`. Returns the previous *p.
inline unsigned atomicInc(unsigned* p, unsigned last) {
  const unsigned before = *p;
  *p = before >= last ? 0 : before + 1;
  return before;
}
