// Helpers for calls that draw their noise in the order (pixels, channels): see Call::channels_last and
// kernels/noise_by_pixels.h.
#pragma once

#include <algorithm>
#include <memory>
#include <numeric>

#include "cpu/kernel_table.h"

namespace ddpm_ext::cpu {

// The number of elements in a group of the widest vectors. A run with this number of channels must have a multiple of
// it; it is also a multiple of the groups of narrower vectors (kernels/noise_by_pixels.h).
inline int64_t whole_groups(int64_t channels) { return 4 * std::lcm(channels, int64_t{16}); }

// Whether a call draws noise for samples that lie as (pixels, channels) in memory, with groups small enough for
// PixelsMemory.
inline bool has_channels_last(const Call& call, const TensorArg& out) {
  if (call.noise_kind != Noise::drawn || call.dims != 2 || call.sizes[1] % 4 != 0) return false;
  const int64_t channels = call.sizes[0];
  return whole_groups(channels) <= kMostInGroup && out.strides[0] == 1 && out.strides[1] == channels;
}

// The number of elements that go through a buffer at once, for tensors in another order.
inline int64_t copied_at_once(int64_t channels) {
  const int64_t group = whole_groups(channels), wanted = std::clamp<int64_t>(512 * channels, 2048, 8192);
  return std::max<int64_t>(1, wanted / group) * group;
}

// Sets the fields of a noise-drawing run that depend on the order of its elements.
inline void set_order(const Call& call, PixelsRun& run) {
  // On the heap, since not every system aligns thread_local objects.
  static thread_local const auto memory = std::make_unique<PixelsMemory>();
  run.channels = std::max<int64_t>(1, call.channels_last);
  run.fours_in_sample = call.numel / 4 / run.channels;
  run.memory = memory.get();
}

}  // namespace ddpm_ext::cpu
