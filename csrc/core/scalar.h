// One element's arithmetic, for g++ and nvcc alike. The CPU's vector types (cpu/simd_*.h) offer the same names, so the
// templates in core/ are written once and mean the same operations, in the same order, on every path.
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

namespace ddpm_ext {

DDPM_HD float fma(float a, float b, float c) { return ::fmaf(a, b, c); }
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

// Integer to float, rounded to nearest even.
DDPM_HD float unsigned_to_float(uint32_t u) { return static_cast<float>(u); }
DDPM_HD float signed_to_float(uint32_t u) { return static_cast<float>(static_cast<int32_t>(u)); }

// f with its sign flipped where u has bit 31 set.
DDPM_HD float flip_sign(float f, uint32_t u) { return bits_to_float(float_to_bits(f) ^ (u & 0x80000000u)); }

// As torch.clamp: NaN passes.
DDPM_HD float clamp(float x, float lo, float hi) {
  x = x < lo ? lo : x;
  return x > hi ? hi : x;
}

// 32 x 32 -> 64 bits. The vector types keep such a product in one lane of 64 bits, and so does this one.
DDPM_HD uint64_t multiply_wide(uint32_t a, uint32_t b) { return static_cast<uint64_t>(a) * b; }
DDPM_HD uint32_t high(uint64_t p) { return static_cast<uint32_t>(p >> 32); }
DDPM_HD uint32_t low(uint64_t p) { return static_cast<uint32_t>(p); }
DDPM_HD uint32_t xor3(uint32_t a, uint32_t b, uint32_t c) { return a ^ b ^ c; }

}  // namespace ddpm_ext
