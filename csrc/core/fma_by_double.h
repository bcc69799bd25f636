// fma of floats on machines without the instruction, by arithmetic in double.
//
// The product p = a b is exact in double: 24 + 24 bits fit into 53, and exponents of -298 to 256 into the range of
// double. What is left is to round x = p + c to float once. Rounding it to the nearest double and then to the nearest
// float rounds twice, and is wrong where the double lies halfway between two floats and x beside it. So x is rounded to
// odd first (Boldo & Melquiond 2008, "Emulation of FMA and correctly rounded sums: proved algorithms using rounding to
// odd"): if no double equals x, to that one of its two neighbours whose last bit is 1.
//
//   Proof. Let G be the floats, the points halfway between neighbouring floats, and 2^128 - 2^103, from which on
//   numbers round to infinity. All of G are 0 or doubles whose last bit is 0, since they have at most 25 significant
//   bits, and none is below 2^-150. If x is a double, nothing was rounded. Otherwise x lies between two neighbouring
//   doubles. Both lie in the interval of G in which x lies, its ends included, and the odd one is not an end. So it
//   lies between the same points of G as x, and rounds to the same float. Doubles of this size neither overflow nor
//   underflow. QED
//
// The sum's error, e = x - (the nearest double to x), is a double and known exactly (Knuth's TwoSum).
#pragma once

namespace ddpm_ext {

DDPM_HD float fma_by_double(float a, float b, float c) {
  const double p = static_cast<double>(a) * b, sum = p + c, rest = sum - p, e = (p - (sum - rest)) + (c - rest);
  uint64_t bits;
  memcpy(&bits, &sum, sizeof bits);
  if (e < 0.0 || e > 0.0) bits = (bits - ((e < 0.0) != (sum < 0.0))) | 1;  // towards zero, then to odd; not if e is NaN
  double odd;
  memcpy(&odd, &bits, sizeof odd);
  return static_cast<float>(odd);
}

}  // namespace ddpm_ext
