// What calls need whose noise is drawn in the order (pixels, channels): Call::channels_last, and
// kernels/noise_by_pixels.h.
#pragma once

#include <algorithm>
#include <memory>
#include <numeric>

#include "cpu/kernel_table.h"

namespace ddpm_ext::cpu {

// A run of so many channels has a multiple of this many elements, a group of the widest vectors, which has whole ones
// of the others (kernels/noise_by_pixels.h).
inline int64_t whole_groups(int64_t channels) { return 4 * std::lcm(channels, int64_t{16}); }

// Whether a call draws noise for samples that lie as (pixels, channels) in memory, and groups are small.
inline bool has_channels_last(const Call& call, const TensorArg& out) {
  if (call.noise_kind != Noise::drawn || call.dims != 2 || call.sizes[1] % 4 != 0) return false;
  const int64_t channels = call.sizes[0];
  return whole_groups(channels) <= kMostInGroup && out.strides[0] == 1 && out.strides[1] == channels;
}

// The elements that are copied at once, where a tensor has another order.
inline int64_t copied_at_once(int64_t channels) {
  const int64_t whole = whole_groups(channels), about = std::clamp<int64_t>(512 * channels, 2048, 8192);
  return std::max<int64_t>(1, about / whole) * whole;
}

// Sets the fields of a run of drawn noise that depend on its order.
inline void set_order(const Call& call, PixelsRun& run) {
  static thread_local const auto memory = std::make_unique<PixelsMemory>();  // not all systems align a thread's own
  run.channels = std::max<int64_t>(1, call.channels_last);
  run.fours_in_sample = call.numel / 4 / run.channels;
  run.memory = memory.get();
}

}  // namespace ddpm_ext::cpu
