// Box-Muller: turns two words of 32 random bits into two standard normals. It uses only integer operations and
// correctly rounded + - x fma sqrt, so that every device gives the same bits. The result is within 2e-6 (absolute) of
// the formula in float64.
#pragma once

#include "core/scalar.h"

namespace ddpm_ext {

// Computes the radius sqrt(-2 ln u) of a pair of normals. u = fma(float(w), 2^-32, 2^-33) is in (0, 1].
template <class U>
DDPM_HD auto radius(U w) {
  using F = decltype(unsigned_to_float(w));
  const F u = fma(unsigned_to_float(w), F(0x1p-32f), F(0x1p-33f));
  // u = 2^e (1 + f), with f in [sqrt(1/2) - 1, sqrt(2) - 1)
  const U bits = float_to_bits(u), exponent = (bits - U(0x3f3504f3u)) & U(0xff800000u);  // `exponent` is 2^23 e
  const F f = bits_to_float(bits - exponent) + F(-1.0f);
  // -2 ln(1 + f) = f q(f). The polynomial q minimises the largest absolute error of the square root, 3.1e-7.
  const F q = polynomial(f, -0x1.eba97ap-3f, 0x1.82798ep-2f, -0x1.a48406p-2f, 0x1.fd9c34p-2f, -0x1.55182cp-1f,
                         0x1.000292p+0f, -0x1.00001cp+1f);
  // For u = 1 the logarithm is 0, which the GPU's sqrt (cuda/pair.cuh) does not accept. Adding 2^-100 avoids a root of
  // 0. For any other u it only decides ties of rounding: about one w in 40,000 gets a sum with another last bit.
  return sqrt(fma(q, f, fma(signed_to_float(exponent), F(-0x1.62e430p-23f), F(0x1p-100f))));
}

// Computes the cosine and the sine of the difference between the angle 2 pi w / 2^32 and the nearest multiple of pi.
// The low 31 bits of w, read as a signed number, are this difference, in units of 2 pi / 2^32. If the multiple is odd,
// the cosine and the sine of the whole angle have the opposite signs: the caller flips them (half_turns).
template <class U, class F>
DDPM_HD void cos_sin(U w, F& cosine, F& sine) {
  const F x = signed_to_fraction(w << 1);  // the difference in quarter turns, in [-1, 1]
  const F x2 = x * x;
  const F s = polynomial(x2, 0x1.3912a8p-13f, -0x1.31fbf4p-8f, 0x1.466504p-4f, -0x1.4abba2p-1f, 0x1.921fb4p+0f) * x;
  const F c = polynomial(x2, 0x1.c2939cp-11f, -0x1.55020cp-6f, 0x1.03bd9ap-2f, -0x1.3bd3b0p+0f);
  cosine = fma(c, x2, F(1.0f));
  sine = s;
}

// Returns a word whose bit 31 is set if the multiple of pi nearest to the angle 2 pi w / 2^32 is odd.
template <class U>
DDPM_HD U half_turns(U w) {
  return w + U(0x40000000u);
}

// Computes two normals from two words. Of the four words of a Philox block, w0 and w1 give the first two normals, w2
// and w3 the other two.
template <class U, class F>
DDPM_HD void box_muller(U w0, U w1, F& z0, F& z1) {
  F c, s;
  cos_sin(w1, c, s);
  const F r = flip_sign(radius(w0), half_turns(w1));
  z0 = r * c;
  z1 = r * s;
}

}  // namespace ddpm_ext
