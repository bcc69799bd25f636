// Rescaled guidance (Lin et al. 2024, section 3.4): the standard deviations of the model's output and of the guided
// one, and the factor of the guided output that follows from them.
//
// Every device adds up a sample in the same order. A sample is cut into the chunks of core/loss.h, and element j of a
// chunk belongs to lane j mod kSpreadLanes. A lane adds up the differences from its first element, and their squares,
// in float32. The lanes are added by halves, first to half as many in float32 and then to one in float64: their sums,
// which give the chunk's mean, rounded to float32, and then their squared differences from that mean. The moments of a
// sample are made of its chunks' in float64, by the strands of core/loss.h. So nothing cancels however far from zero
// the sample lies.
#pragma once

#include "core/loss.h"

namespace ddpm_ext {

constexpr int kSpreadLanes = 32;

struct ChunkMoments {
  double mean, squares;  // the sum of squares is that of the differences from the mean
};

// How many of a sample's elements chunk i has.
DDPM_HD int64_t chunk_length(int64_t numel, int64_t i) {
  const int64_t left = numel - i * kLossChunk;
  return left < kLossChunk ? left : kLossChunk;
}

// How many of a chunk's elements lane l has.
DDPM_HD int64_t lane_length(int64_t length, int l) { return (length - l + kSpreadLanes - 1) / kSpreadLanes; }

DDPM_HD float chunk_mean(double sum, int64_t length) { return static_cast<float>(sum / static_cast<double>(length)); }

// The moments of a lane, or for a vector type F of as many lanes.
template <class F>
struct LaneMoments {
  F minus_first, sum, squares;  // the sums of the differences from the first element

  DDPM_HD void begin(F first) {
    minus_first = F(-1.0f) * first;
    sum = squares = F(0.0f);
  }
  DDPM_HD F difference(F value) const { return value + minus_first; }
  DDPM_HD void add(F difference) {
    sum = sum + difference;
    squares = fma(difference, difference, squares);
  }

  // The sum of the lane's n elements, and that of their squared differences from `mean`.
  DDPM_HD F total(F n) const { return fma(F(-1.0f) * n, minus_first, sum); }
  DDPM_HD F squares_from(F mean, F n) const {
    const F shift = mean + minus_first;
    return fma(shift, fma(F(-2.0f), sum, n * shift), squares);
  }
};

// The terms of a sample's sum and of its sum of squared differences from `mean`.
DDPM_HD double sum_term(const ChunkMoments& chunk, int64_t length) { return chunk.mean * static_cast<double>(length); }
DDPM_HD double squares_term(const ChunkMoments& chunk, int64_t length, double mean) {
  const double difference = chunk.mean - mean;
  return chunk.squares + static_cast<double>(length) * (difference * difference);
}

// 1 + rescale (std(model) / std(guided) - 1), by the sums of squares.
DDPM_HD float spread_scale(double of_model, double of_guided, double rescale) {
  return static_cast<float>(1.0 + rescale * (::sqrt(of_model / of_guided) - 1.0));
}

}  // namespace ddpm_ext
