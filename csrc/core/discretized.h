// The negative log-probability of one element of an 8-bit image under a Gaussian, and its derivatives. It is -ln of the
// Gaussian's integral over the element's bin, which is 2/255 wide (Ho et al. 2020, eq. 13). The first and the last bin
// reach to infinity.
//
// These functions take scalars, not vectors: only samples at timestep 0 need them, about one in a thousand.
#pragma once

#include "core/exponential.h"

namespace ddpm_ext {

// A negative log-probability and its derivatives by the mean and by the log-variance.
struct Unlikeliness {
  float value, by_mean, by_log_variance;
};

// Computes 1 / x for a normal x > 0, within an ulp. The subtraction of bits negates the exponent, which gives a first
// guess with an error of at most 5.1%. Each iteration of Newton's method squares the error.
DDPM_HD float reciprocal(float x) {
  float y = bits_to_float(0x7ef311c3u - float_to_bits(x));
  for (int i = 0; i < 3; ++i) y = fma(y, fma(-x, y, 1.0f), y);
  return y;
}

// Computes ln x for a normal x > 0.
DDPM_HD float logarithm(float x) {
  // x = 2^e (1 + f), with f in [sqrt(1/2) - 1, sqrt(2) - 1)
  const uint32_t bits = float_to_bits(x), exponent = (bits - 0x3f3504f3u) & 0xff800000u;  // `exponent` is 2^23 e
  const float f = bits_to_float(bits - exponent) - 1.0f;
  // ln(1 + f) = f q. The polynomial q minimises the largest relative error, 3e-8.
  const float q = polynomial(f, 0x1.65f094p-4f, -0x1.25059cp-3f, 0x1.317caep-3f, -0x1.535c2cp-3f, 0x1.98d3a0p-3f,
                             -0x1.0004a8p-2f, 0x1.5556f0p-2f, -0x1.fffffap-2f, 1.0f);
  return fma(signed_to_float(exponent), 0x1.62e430p-24f, f * q);
}

// Computes -ln(1 - q) for q in [0, 1). For a small q it uses a series, since 1 - q would lose digits of q.
DDPM_HD float unlikeliness_of_complement(float q) {
  if (q > 0.1f) return -logarithm(1.0f - q);
  return q * fma(q, fma(q, fma(q, fma(q, fma(q, 1.0f / 6, 0.2f), 0.25f), 1.0f / 3), 0.5f), 1.0f);
}

// Computes Mills' ratio: the probability that a standard normal exceeds x, divided by its density at x, for x >= 0.
DDPM_HD float mills_ratio(float x) {
  const float t = reciprocal(fma(x, 0x1.333334p-2f, 1.0f));
  // The polynomial p minimises the largest relative error, 2.3e-8.
  const float p =
      polynomial(t, -0x1.c32702p-6f, 0x1.9a3afap-4f, -0x1.4fed3cp-4f, -0x1.32d780p-4f, 0x1.b52f3ep-5f, 0x1.545a00p-5f,
                 0x1.36360ap-3f, 0x1.bed9b8p-3f, 0x1.179a7cp-2f, 0x1.3332eep-2f, 0x1.333334p-2f);
  return p * t;
}

// Computes the density of the standard normal at x.
DDPM_HD float density(float x) { return exponential(-0.5f * x * x) * 0x1.988454p-2f; }

constexpr float kHalfBin = 0x1.010102p-8f;  // 1 / 255, half the width of a bin
constexpr float kHalfLnTwoPi = 0x1.d67f1cp-1f;

// Computes -ln of the probability that a standard normal exceeds w. `slope` is the derivative by w.
DDPM_HD float tail_unlikeliness(float w, float& slope) {
  if (w < 0.0f) {
    const float peak = density(w), q = peak * mills_ratio(-w);
    slope = peak * reciprocal(1.0f - q);
    return unlikeliness_of_complement(q);
  }
  const float ratio = mills_ratio(w);
  slope = reciprocal(ratio);
  return fma(0.5f * w, w, kHalfLnTwoPi) - logarithm(ratio);
}

// Computes -ln of the probability of a bin. Its middle is `distance` >= 0 away from the Gaussian's mean. `inverse` is
// one over the standard deviation, and half_log_variance is the standard deviation's logarithm. In standard deviations
// the bin reaches from u - h to u + h. by_u is the derivative of the result by u, u_by_u is u times that derivative,
// and h_by_h is h times the derivative by h.
DDPM_HD float bin_unlikeliness(float distance, float inverse, float half_log_variance, float& by_u, float& u_by_u,
                               float& h_by_h) {
  const float u = distance * inverse, h = kHalfBin * inverse;
  if (h < 0.1f && u * h < 0.2f) {
    // The density hardly changes within the bin, whose probability is 2 h density(u) (1 + s). s is a power series in h,
    // cut off after h^4: `second` and `fourth` are its terms.
    const float y = u * h, k = h * h, y2 = y * y;
    const float second = (y2 - k) * (1.0f / 6), fourth = fma(y2, fma(-6.0f, k, y2), 3.0f * k * k) * (1.0f / 120);
    const float s = second + fourth, inverse_sum = fma(-s, fma(-s, 1.0f - s, 1.0f), 1.0f);  // 1 / (1 + s)
    const float s_by_u = h * y * fma(4.0f / 120, fma(-3.0f, k, y2), 1.0f / 3);
    by_u = fma(-inverse_sum, s_by_u, u);
    u_by_u = u * by_u;
    h_by_h = fma(-inverse_sum, fma(4.0f, fourth, 2.0f * second), -1.0f);
    constexpr float kLnWidth = 0x1.71176ep+2f;  // -ln(2 / 255 / sqrt(2 pi))
    return fma(0.5f * u, u, half_log_variance + kLnWidth) - s * fma(s, fma(s, 1.0f / 3, -0.5f), 1.0f);
  }
  const float a = (distance - kHalfBin) * inverse, b = u + h;
  if (a >= 0.0f) {
    // The whole bin, from a to b, is above the mean. Its probability is
    // density(a) (mills_ratio(a) - mills_ratio(b) density(b) / density(a)).
    const float density_ratio = exponential(-2.0f * u * h),  // density(b) / density(a)
        mills_difference = fma(-mills_ratio(b), density_ratio, mills_ratio(a));
    const float slope = reciprocal(mills_difference);
    by_u = slope * (1.0f - density_ratio);
    u_by_u = u * by_u;
    h_by_h = -h * slope * (1.0f + density_ratio);
    return fma(0.5f * a, a, kHalfLnTwoPi) - logarithm(mills_difference);
  }
  // The mean lies within the bin. q is the probability of the two tails outside the bin.
  const float density_a = density(a), density_b = density(b);
  const float q = fma(density_a, mills_ratio(-a), density_b * mills_ratio(b)), slope = reciprocal(1.0f - q);
  by_u = slope * (density_a - density_b);
  u_by_u = u * by_u;
  h_by_h = -h * slope * (density_a + density_b);
  return unlikeliness_of_complement(q);
}

// Computes the negative log-probability of the bin whose middle is x_start, and its derivatives. `difference` is
// x_start minus the Gaussian's mean. log_variance is clamped to [-60, 60].
DDPM_HD Unlikeliness unlikeliness(float x_start, float difference, float log_variance) {
  const float half = clamp(0.5f * log_variance, -30.0f, 30.0f), inverse = exponential(-half);
  if (x_start > 0.999f || x_start < -0.999f) {  // the first and the last bin reach to infinity
    const float side = x_start > 0.0f ? 1.0f : -1.0f, w = fma(side, difference, -kHalfBin) * inverse;
    float slope;
    const float value = tail_unlikeliness(w, slope);
    return {value, -side * slope * inverse, -0.5f * w * slope};
  }
  float by_u, u_by_u, h_by_h;
  const float side = difference < 0.0f ? -1.0f : 1.0f;
  const float value = bin_unlikeliness(side * difference, inverse, half, by_u, u_by_u, h_by_h);
  return {value, -side * by_u * inverse, -0.5f * (u_by_u + h_by_h)};
}

}  // namespace ddpm_ext
