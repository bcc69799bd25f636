// Computes the fma of floats by arithmetic in double, for CPUs without an fma instruction.
//
// The product p = a b is exact in double: 24 + 24 bits fit into 53, and exponents of -298 to 256 into the range of
// double. So only x = p + c has to be rounded to float, once. Rounding x to the nearest double and then to the nearest
// float rounds twice. That is wrong where the double lies halfway between two floats and x lies close to the double. So
// x is rounded to odd first (Boldo & Melquiond 2008, "Emulation of FMA and correctly rounded sums: proved algorithms
// using rounding to odd"): if x is not a double itself, it becomes the neighbouring double whose last bit is 1.
//
//   Proof. Let G be the set of all floats, all points halfway between neighbouring floats, and 2^128 - 2^103, the bound
//   from which numbers round to infinity. Each element of G is 0 or a double whose last bit is 0, since it has at most
//   25 significant bits and none is below 2^-150. If x is a double, nothing was rounded. Otherwise x lies between two
//   neighbouring doubles. Both lie in the interval of G that contains x, its ends included, and the odd double is not
//   an end. So the odd double lies between the same two points of G as x, and rounds to the same float. Doubles of this
//   size neither overflow nor underflow. QED
//
// The sum's error e, which is x minus the nearest double to x, is a double and is computed exactly (Knuth's TwoSum).
#pragma once

namespace ddpm_ext {

DDPM_HD float fma_by_double(float a, float b, float c) {
  const double p = static_cast<double>(a) * b, sum = p + c, rounded_c = sum - p,
               e = (p - (sum - rounded_c)) + (c - rounded_c);
  uint64_t bits;
  memcpy(&bits, &sum, sizeof bits);
  // Rounds to odd. If the sum is farther from zero than p + c, subtracting 1 from its bits steps to the neighbouring
  // double nearer to zero. Then the last bit is set. Nothing changes if e is 0 or NaN.
  if (e < 0.0 || e > 0.0) bits = (bits - ((e < 0.0) != (sum < 0.0))) | 1;
  double odd;
  memcpy(&odd, &bits, sizeof odd);
  return static_cast<float>(odd);
}

}  // namespace ddpm_ext
