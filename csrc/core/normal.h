// Box-Muller: two words of 32 random bits to two standard normals, from integer operations and correctly rounded
// + - x fma sqrt alone, so that every device gives the same bits. Within 2e-6 of the formula in float64.
#pragma once

#include "core/scalar.h"

namespace ddpm_ext {

// sqrt(-2 ln u) with u = fma(float(w), 2^-32, 2^-33).
template <class U>
DDPM_HD auto radius(U w) {
  using F = decltype(unsigned_to_float(w));
  const F u = fma(unsigned_to_float(w), F(0x1p-32f), F(0x1p-33f));
  // u = 2^e (1 + f), f in [sqrt(1/2) - 1, sqrt(2) - 1)
  const U bits = float_to_bits(u), offset = bits - U(0x3f3504f3u);
  const F e = signed_to_float(shift_right_signed(offset, 23));
  const F f = bits_to_float(bits - (offset & U(0xff800000u))) - F(1.0f);
  // -2 ln(1 + f) = f q(f): q minimax for the error of the square root, 4.5e-8
  F q = F(0x1.a3adf8p-3f);
  q = fma(q, f, F(-0x1.51084cp-2f));
  q = fma(q, f, F(0x1.6227c2p-2f));
  q = fma(q, f, F(-0x1.96d04ep-2f));
  q = fma(q, f, F(0x1.ff3d10p-2f));
  q = fma(q, f, F(-0x1.555e70p-1f));
  q = fma(q, f, F(0x1.0000c2p+0f));
  q = fma(q, f, F(-0x1.fffff6p+0f));
  return sqrt(fma(q, f, e * F(-0x1.62e430p+0f)));
}

// cos and sin of 2 pi w / 2^32. The angle's part beyond the nearest quarter turn is w's low 30 bits, read as signed.
template <class U, class F>
DDPM_HD void cos_sin(U w, F& cosine, F& sine) {
  const F x = signed_to_float(w << 2) * F(0x1p-31f);  // in [-1, 1]: eighths of a turn
  const F x2 = x * x;
  F s = F(-0x1.2a7638p-15f);
  s = fma(s, x2, F(0x1.46496cp-9f));
  s = fma(s, x2, F(-0x1.4abb68p-4f));
  s = fma(s, x2, F(0x1.921fb4p-1f)) * x;
  F c = F(-0x1.4eb112p-12f);
  c = fma(c, x2, F(0x1.03b18ep-6f));
  c = fma(c, x2, F(-0x1.3bd3a2p-2f));
  c = fma(c, x2, F(1.0f));
  const U quarter = w + U(0x20000000u);  // its bits 31 and 30 number the nearest quarter
  cosine = flip_sign(select_bit30(quarter, s, c), w + U(0x60000000u));
  sine = flip_sign(select_bit30(quarter, c, s), quarter);
}

template <class U, class F>
DDPM_HD void box_muller(U w0, U w1, F& z0, F& z1) {
  const F r = radius(w0);
  F c, s;
  cos_sin(w1, c, s);
  z0 = r * c;
  z1 = r * s;
}

}  // namespace ddpm_ext
