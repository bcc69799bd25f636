// The exponential. It uses only integer operations and correctly rounded + x fma, so that every device gives the same
// bits.
#pragma once

#include "core/scalar.h"

namespace ddpm_ext {

// Computes scale, r and p of e^y = scale (1 + r + r^2 p), for y in [-87, 88] or NaN. scale is a power of two, and r is
// at most ln 2 / 2 + 2e-6 in absolute value.
template <class F>
DDPM_HD void exponential_parts(F y, F& scale, F& r, F& p) {
  // y = n ln 2 + r. Adding 1.5 x 2^23 rounds y / ln 2 to the nearest integer n, which the low bits of `shifted` hold.
  const F shifted = fma(y, F(0x1.715476p+0f), F(0x1.8p+23f)), n = shifted + F(-0x1.8p+23f);
  r = fma(n, F(0x1.bd0106p-13f), fma(n, F(-0x1.63p-1f), y));  // ln 2 in two parts: 0x1.63p-1 - 0x1.bd0106p-13
  // The polynomial p minimises the largest relative error of e^y: 3.1e-9, and 3.8e-9 with coefficients in float32.
  p = polynomial(r, 0x1.6a2434p-10f, 0x1.1239e2p-7f, 0x1.5558f2p-5f, 0x1.555492p-3f, 0x1.fffffcp-2f);
  using U = decltype(float_to_bits(y));
  scale = bits_to_float((float_to_bits(shifted) << 23) + U(0x3f800000u));
}

// Computes e^y with a relative error of at most 1.3 x 2^-24. y is clamped to [-87, 88], where e^y is a normal float32.
// NaN stays NaN.
template <class F>
DDPM_HD F exponential(F y) {
  F scale, r, p;
  exponential_parts(clamp(y, F(-87.0f), F(88.0f)), scale, r, p);
  return fma(fma(p, r, F(1.0f)), r, F(1.0f)) * scale;
}

// Computes e^y - 1 - y without cancellation near 0, and also e^y, for y in [-87, 88].
template <class F>
DDPM_HD F exponential_excess(F y, F& exponential) {
  F scale, r, p;
  exponential_parts(y, scale, r, p);
  exponential = fma(fma(p, r, F(1.0f)), r, F(1.0f)) * scale;
  // For y near 0, scale is 1 and r is y. Then all terms but scale r^2 p are exactly 0.
  return fma(scale, r * r * p, fma(scale, r, F(-1.0f) * y) + (scale + F(-1.0f)));
}

}  // namespace ddpm_ext
