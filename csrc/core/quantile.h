// Dynamic thresholding (Saharia et al. 2022, section 2.3): the quantile of a sample's magnitudes |x0|, and the scale of
// x0 that follows from it. A magnitude is represented by the bits of its float32: as integers they have the same order.
#pragma once

#include "core/scalar.h"

namespace ddpm_ext {

constexpr uint32_t kMagnitude = 0x7fffffff;          // the mask of a magnitude: all bits but the sign
constexpr uint32_t kInfiniteMagnitude = 0x7f800000;  // the bits of infinity; those of a NaN are larger

// The quantile is interpolated between two magnitudes: the `from_top`-th largest (1 is the largest), and the next
// larger one.
struct QuantileRank {
  int64_t from_top = 1;
  float weight = 0;  // of the larger magnitude

  // The rank of the quantile q in [0, 1] of n magnitudes. Its position is q (n - 1), where the smallest has position 0.
  static DDPM_HD QuantileRank of(double q, int64_t n) {
    const double position = q * static_cast<double>(n - 1), below = ::floor(position);
    return {n - static_cast<int64_t>(below), static_cast<float>(position - below)};
  }
  // Whether the next larger magnitude exists and has a weight.
  DDPM_HD bool between() const { return weight != 0.0f && from_top > 1; }
};

// Interpolates as torch.lerp does.
DDPM_HD float interpolate(float below, float above, float weight) {
  const float difference = above - below;
  return weight < 0.5f ? fma(weight, difference, below) : fma(weight - 1.0f, difference, above);
}

// Returns 1 / bound. The bound is the quantile, but at least 1 and at most `maximum`. NaN stays NaN. The quantile is
// interpolated between the magnitudes with the bits `below` and `above`.
DDPM_HD float threshold_scale(uint32_t below, uint32_t above, float weight, float maximum) {
  return 1.0f / clamp(interpolate(bits_to_float(below), bits_to_float(above), weight), 1.0f, maximum);
}

}  // namespace ddpm_ext
