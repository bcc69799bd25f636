// Rescaled guidance (Lin et al. 2024, section 3.4): the standard deviations of the model's output and of the guided
// one, and the factor of the guided output that follows from them.
//
// Every device adds up a sample in the order of core/loss.h. A chunk has a mean, which is its sum divided by its length
// and rounded to float32, and the sum of the squared differences from that mean. Those of a sample are made of these in
// float64, so nothing cancels however far from zero the sample lies.
#pragma once

#include "core/loss.h"

namespace ddpm_ext {

struct ChunkMoments {
  double mean, squares;  // the sum of squares is that of the differences from the mean
};

// How many of a sample's elements chunk i has.
DDPM_HD int64_t chunk_length(int64_t numel, int64_t i) {
  const int64_t left = numel - i * kLossChunk;
  return left < kLossChunk ? left : kLossChunk;
}

DDPM_HD float chunk_mean(double sum, int64_t length) { return static_cast<float>(sum / static_cast<double>(length)); }

// The square of a difference from the chunk's mean.
template <class F>
DDPM_HD F squared_difference(float mean, F value) {
  const F difference = fma(F(-1.0f), F(mean), value);
  return difference * difference;
}

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
