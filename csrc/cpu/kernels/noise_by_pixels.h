// Draws noise in the order (pixels, channels), where that of logical indices, which the noise follows, is
// (channels, pixels).
#pragma once

#include "cpu/kernels/normals.h"
#include "cpu/kernels/transpose.h"

namespace ddpm_ext::DDPM_ISA {
namespace {

// Stores a vector as pieces of kPiece elements that are `apart` elements from each other.
template <int kPiece>
DDPM_HD void store_pieces(float* to, int64_t apart, F32 x) {
  typedef float Piece __attribute__((vector_size(kPiece * sizeof(float))));
  Piece pieces[F32::kLanes / kPiece];
  memcpy(pieces, &x, sizeof(x));
  for (int i = 0; i < F32::kLanes / kPiece; ++i) memcpy(to + i * apart, &pieces[i], sizeof(Piece));
}

// A vector of blocks, each of four pixels of a channel, has those of kTogether neighbouring channels. If that is more
// than one, the blocks' elements k are neighbours in the result, too. Else whole channels are drawn and transposed.
template <int kTogether>
void draw_channels(const PixelsRun& run) {
  constexpr int64_t kFours = F32::kLanes / kTogether;  // of pixels, in a vector
  const int64_t channels = run.channels, vectors = (run.fours + kFours - 1) / kFours;
  const PhiloxKeys keys = *run.keys;
  const PhiloxSample counter = run.counter;
  uint32_t numbers[F32::kLanes];
  for (int i = 0; i < F32::kLanes; ++i)
    numbers[i] = run.first_four + static_cast<uint32_t>(i % kTogether * run.fours_in_sample + i / kTogether);
  U32 blocks;
  memcpy(&blocks, numbers, sizeof(numbers));
  Products first = multiply_wide(kTogether == 1 ? block_words(run.first_four) : words_in_order(blocks), kPhiloxM0);
  // From one vector to the next, and from the last one of some channels to the first one of the next channels.
  const uint64_t step = uint64_t{kPhiloxM0} * kFours;
  const uint64_t jump = kPhiloxM0 * static_cast<uint64_t>(kTogether * run.fours_in_sample - (vectors - 1) * kFours);
  int64_t left = vectors;
  const auto next = [&]() __attribute__((always_inline)) {
    const Products products = first;
    const uint64_t last = --left == 0;
    first = first + (step + last * (jump - step));  // a branch would keep apart what is drawn in parallel
    left += last * vectors;
    return products;
  };
  float* to = kTogether == 1 ? run.rows : run.noise;
  int64_t stored = 0;
  const auto body = [&](int64_t i, F32(&z)[4]) __attribute__((always_inline)) {
    for (const Ahead& ahead : run.ahead) {
      constexpr int64_t kNoise = 4 * F32::kLanes, kBytes = kNoise * sizeof(float);
      const char* const from = ahead.data + i * kNoise * ahead.element_size;
      for (int64_t line = 0; line < kBytes; line += 64) __builtin_prefetch(from + line);
    }
    if constexpr (kTogether == 1) {
      transpose(z);
      for (int k = 0; k < 4; ++k) store(to + k * F32::kLanes, z[k]);
      to += 4 * F32::kLanes;
    } else {
      for (int k = 0; k < 4; ++k) store_pieces<kTogether>(to + k * channels, 4 * channels, z[k]);
      to += 4 * kFours * channels;
      if (++stored == vectors) {
        to += kTogether - vectors * 4 * kFours * channels;
        stored = 0;
      }
    }
  };
  for_each_draw(keys, counter, channels / kTogether * vectors, next, body);
  if constexpr (kTogether == 1)
    transpose_matrix<uint32_t>(run.rows, 4 * kFours * vectors, run.noise, channels, 4 * run.fours, channels);
}

void draw_by_pixels(const PixelsRun& run) {
#ifndef DDPM_WITHOUT_FMA  // else drawing takes so long that transposing does not count
  if (F32::kLanes >= 16 && run.channels % 16 == 0) return draw_channels<(F32::kLanes >= 16 ? 16 : 4)>(run);
  if (F32::kLanes >= 8 && run.channels % 8 == 0) return draw_channels<(F32::kLanes >= 8 ? 8 : 4)>(run);
  if (run.channels % 4 == 0) return draw_channels<4>(run);
#endif
  draw_channels<1>(run);
}

}  // namespace
}  // namespace ddpm_ext::DDPM_ISA
