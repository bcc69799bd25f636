// Helpers for calls whose kernels draw the noise in the order (pixels, channels): see Call::channels_last and
// kernels/noise_by_pixels.h, which explains groups.
#pragma once

#include <algorithm>
#include <memory>
#include <numeric>

#include "cpu/kernel_table.h"

namespace ddpm_ext::cpu {

// Returns the number of elements in a group for vectors of 16 lanes, the widest. It is a multiple of the groups for
// narrower vectors, too. A run in the order (pixels, channels) must have a multiple of this number of elements.
inline int64_t whole_groups(int64_t channels) { return 4 * std::lcm(channels, int64_t{16}); }

// Whether a call draws noise for samples whose result `out` is channels_last, the number of pixels is a multiple of
// four, and groups are small enough for PixelsMemory.
inline bool has_channels_last(const Call& call, const TensorArg& out) {
  if (call.noise_kind != Noise::drawn || call.dims != 2 || call.sizes[1] % 4 != 0) return false;
  const int64_t channels = call.sizes[0];
  return whole_groups(channels) <= kMostInGroup && out.strides[0] == 1 && out.strides[1] == channels;
}

// Returns the number of elements of a run that goes through a buffer, since a tensor is not channels_last. It is about
// the number of elements of 512 pixels, from 2048 to 8192, in whole groups.
inline int64_t copied_at_once(int64_t channels) {
  const int64_t group = whole_groups(channels), wanted = std::clamp<int64_t>(512 * channels, 2048, 8192);
  return std::max<int64_t>(1, wanted / group) * group;
}

// Sets the fields of a PixelsRun that depend on the order of its elements.
inline void set_order(const Call& call, PixelsRun& run) {
  // PixelsMemory is on the heap, since not every system aligns thread_local objects.
  static thread_local const auto memory = std::make_unique<PixelsMemory>();
  run.channels = std::max<int64_t>(1, call.channels_last);
  run.fours_in_sample = call.numel / 4 / run.channels;
  run.memory = memory.get();
}

}  // namespace ddpm_ext::cpu
