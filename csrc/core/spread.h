// Rescaled guidance (Lin et al. 2024, section 3.4): the standard deviations of the model's output and of the guided
// output, and the factor that rescales the guided output.
//
// Every device adds up a sample in the same order:
// - A sample is cut into the chunks of core/loss.h. Element j of a chunk belongs to lane j mod kSpreadLanes.
// - A lane adds up the differences from its first element, and the squares of these differences, in float32.
// - The lanes are added by halves: first to half as many lanes in float32, then to a single sum in float64. This is
//   done twice. The first sum gives the chunk's mean, rounded to float32. The second is the sum of the squared
//   differences from that mean.
// - The moments of the chunks are combined to those of the sample in float64, by the strands of core/loss.h.
// Sums of differences lose no digits by cancellation, however far from zero the sample lies.
#pragma once

#include "core/loss.h"

namespace ddpm_ext {

constexpr int kSpreadLanes = 32;

// The mean of a chunk's elements, and the sum of their squared differences from the mean.
struct ChunkMoments {
  double mean, squares;
};

// The number of elements in chunk i of a sample.
DDPM_HD int64_t chunk_length(int64_t numel, int64_t i) {
  const int64_t left = numel - i * kLossChunk;
  return left < kLossChunk ? left : kLossChunk;
}

// The number of elements in lane l of a chunk.
DDPM_HD int64_t lane_length(int64_t length, int l) { return (length - l + kSpreadLanes - 1) / kSpreadLanes; }

DDPM_HD float chunk_mean(double sum, int64_t length) { return static_cast<float>(sum / static_cast<double>(length)); }

// The moments of one lane, or of F::kLanes lanes if F is a vector type. minus_first is -1 times the lane's first
// element. `sum` and `squares` are the sums of the differences from the first element, and of their squares.
template <class F>
struct LaneMoments {
  F minus_first, sum, squares;

  DDPM_HD void begin(F first) {
    minus_first = F(-1.0f) * first;
    sum = squares = F(0.0f);
  }
  DDPM_HD F difference(F value) const { return value + minus_first; }
  DDPM_HD void add(F difference) {
    sum = sum + difference;
    squares = fma(difference, difference, squares);
  }

  // The sum of the lane's n elements, and the sum of their squared differences from `mean`.
  DDPM_HD F total(F n) const { return fma(F(-1.0f) * n, minus_first, sum); }
  DDPM_HD F squares_from(F mean, F n) const {
    const F shift = mean + minus_first;
    return fma(shift, fma(F(-2.0f), sum, n * shift), squares);
  }
};

// What a chunk adds to the sample's sum, and to the sample's sum of squared differences from `mean`.
DDPM_HD double sum_term(const ChunkMoments& chunk, int64_t length) { return chunk.mean * static_cast<double>(length); }
DDPM_HD double squares_term(const ChunkMoments& chunk, int64_t length, double mean) {
  const double difference = chunk.mean - mean;
  return chunk.squares + static_cast<double>(length) * (difference * difference);
}

// Returns 1 + rescale (std(model) / std(guided) - 1), from the sums of squared differences.
DDPM_HD float spread_scale(double of_model, double of_guided, double rescale) {
  return static_cast<float>(1.0 + rescale * (::sqrt(of_model / of_guided) - 1.0));
}

}  // namespace ddpm_ext
