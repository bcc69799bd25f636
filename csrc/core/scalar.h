// The arithmetic of one element, for g++ and nvcc alike. The templates in core/ are written once, for all types below,
// and perform the same operations in the same order for each type.
//
// A vector type that stands in for float and uint32_t (cpu/simd/, cuda/pair.cuh) must provide, for its float type F
// and its integer type U:
//   F(float), U(uint32_t)            the same value in every lane
//   F + F, F * F, fma, sqrt, clamp   each correctly rounded (sqrt from 2^-100 to 2^100), clamp as below
//   U + U, U - U, U & U, U << int
//   bits_to_float, float_to_bits, signed_to_float, unsigned_to_float, flip_sign
// The CPU's vector types also provide, for the CPU's kernels (cpu/kernels/):
//   F::kLanes                        the number of elements
//   Words, Products                  Philox's words and their 64-bit products, in any order of lanes
//   multiply_wide, high, low, xor3, Words(uint32_t), Words ^ uint32_t, Products + uint64_t, Products + Products
//   choose<lanes...>(a, b)           a vector of chosen lanes of a and b
//   block_words(first)               the numbers of kLanes consecutive blocks, as Words
//   words_in_order(U)                the Words from which join() returns this U
//   join(Words), join_high(Products) the words, or the products' high words, as a U; xor3 also takes a U
//   transpose(F (&z)[4])             reorders the elements of kLanes blocks from z[k], which has the k-th element of
//                                    every block, to the order of memory
//   load(p), store(p, F)             for float, Float16 and BFloat16; a store rounds to nearest even
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__CUDACC__)
#define DDPM_HD __host__ __device__ __forceinline__
#define DDPM_UNROLL _Pragma("unroll")
#else
#define DDPM_HD inline __attribute__((always_inline))
#define DDPM_UNROLL
#endif

#ifdef DDPM_WITHOUT_FMA  // for a CPU without an fma instruction: the C library's fma would take hundreds of cycles
#include "core/fma_by_double.h"
#endif

namespace ddpm_ext {

#ifdef DDPM_WITHOUT_FMA
DDPM_HD float fma(float a, float b, float c) { return fma_by_double(a, b, c); }
#else
DDPM_HD float fma(float a, float b, float c) { return ::fmaf(a, b, c); }
#endif
DDPM_HD float sqrt(float x) { return ::sqrtf(x); }

DDPM_HD float bits_to_float(uint32_t u) {
  float f;
  memcpy(&f, &u, sizeof f);
  return f;
}
DDPM_HD uint32_t float_to_bits(float f) {
  uint32_t u;
  memcpy(&u, &f, sizeof u);
  return u;
}

// Convert an unsigned or a signed 32-bit integer to float, rounding to nearest even.
DDPM_HD float unsigned_to_float(uint32_t u) { return static_cast<float>(u); }
DDPM_HD float signed_to_float(uint32_t u) { return static_cast<float>(static_cast<int32_t>(u)); }

// Computes the signed integer u times 2^-31 as a float, rounded to nearest even. cpu/simd/neon.h has an overload,
// since NEON has one instruction for both operations.
template <class U>
DDPM_HD auto signed_to_fraction(U u) {
  return signed_to_float(u) * decltype(signed_to_float(u))(0x1p-31f);
}

// Returns f with its sign flipped if u has bit 31 set.
DDPM_HD float flip_sign(float f, uint32_t u) { return bits_to_float(float_to_bits(f) ^ (u & 0x80000000u)); }

// Clamps as torch.clamp does: NaN stays NaN.
DDPM_HD float clamp(float x, float lo, float hi) {
  x = x < lo ? lo : x;
  return x > hi ? hi : x;
}

// Evaluates a polynomial. The coefficient of the highest power comes first.
template <class F, class... Floats>
DDPM_HD F polynomial(F x, float highest, Floats... others) {
  F sum = F(highest);
  ((sum = fma(sum, x, F(others))), ...);
  return sum;
}

// Returns the 64-bit product of two 32-bit words. high and low take such a product. join and join_high matter only to
// vector types that keep words in two halves: here they return the word, and the product's high word.
DDPM_HD uint64_t multiply_wide(uint32_t a, uint32_t b) { return static_cast<uint64_t>(a) * b; }
DDPM_HD uint32_t high(uint64_t p) { return static_cast<uint32_t>(p >> 32); }
DDPM_HD uint32_t low(uint64_t p) { return static_cast<uint32_t>(p); }
DDPM_HD uint32_t join(uint32_t w) { return w; }
DDPM_HD uint32_t join_high(uint64_t p) { return high(p); }
DDPM_HD uint32_t xor3(uint32_t a, uint32_t b, uint32_t c) { return a ^ b ^ c; }

}  // namespace ddpm_ext
