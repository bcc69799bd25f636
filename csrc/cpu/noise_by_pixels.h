// Draws noise ahead of the kernels, for calls whose order is (pixels, channels): Call::channels_last.
#pragma once

#include <algorithm>
#include <iterator>

#include "cpu/kernel_table.h"
#include "cpu/operators.h"

namespace ddpm_ext::cpu {

// The elements of a sample whose noise is drawn at once: all channels of as many pixels as fill whole runs and vectors.
// A core's first cache holds them and as many of a few tensors. Where a tensor is transposed, more pixels are better.
inline int64_t drawn_at_once(const Call& call) {
  const int64_t channels = call.channels_last;
  const int64_t about = call.contiguous ? 2048 : std::clamp<int64_t>(512 * channels, 2048, 8192);
  const int64_t least = (channels % 4 == 0 ? 16 : kRunMultiple) * channels;
  return std::max<int64_t>(1, about / least) * least;
}

// A thread's memory for that noise, and for scratch of the same size, in elements.
inline int64_t most_noise(const Call& call) { return drawn_at_once(call) + kRunMultiple * call.channels_last; }
inline int64_t noise_memory(const Call& call) { return 2 * most_noise(call); }

// Draws the noise of n elements of a sample from element j on. Meanwhile a core fetches the first of `parts` that the
// kernel will need.
inline void draw_by_pixels(const Call& call, const NoisyRun& run, int64_t j, int64_t n, const Ahead* ahead,
                           size_t parts, float* memory) {
  const int64_t channels = call.channels_last;
  PixelsRun pixels{run.keys, run.counter, channels, n / 4 / channels, call.numel / 4 / channels};
  pixels.first_four = static_cast<uint32_t>(j / 4 / channels);
  std::fill(std::begin(pixels.ahead), std::end(pixels.ahead), Ahead{reinterpret_cast<const char*>(memory), 0});
  std::copy_n(ahead, std::min(parts, std::size(pixels.ahead)), pixels.ahead);
  pixels.noise = memory;
  pixels.rows = memory + most_noise(call);
  kernels().draw_by_pixels(pixels);
}

}  // namespace ddpm_ext::cpu
