// IEEE 754's binary16, CUDA's __half. Conversion from float32 rounds to nearest even.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "standin/vector_types.h"

struct __half {
  uint16_t bits;
};
struct alignas(4) __half2 {
  __half x, y;
};

inline float __half2float(__half h) {
  const int exponent = h.bits >> 10 & 31, mantissa = h.bits & 1023;
  float magnitude =
      ldexpf(static_cast<float>(mantissa + (exponent > 0 ? 1024 : 0)), (exponent > 0 ? exponent : 1) - 25);
  if (exponent == 31) magnitude = mantissa == 0 ? INFINITY : NAN;
  return h.bits >> 15 ? -magnitude : magnitude;
}

inline __half __float2half_rn(float f) {
  const float magnitude = fabsf(f);
  uint32_t u;
  memcpy(&u, &magnitude, sizeof u);
  uint32_t bits;
  if (f != f) {
    return {0x7fff};
  } else if (magnitude >= 65520.0f) {  // from here on, numbers round to infinity
    bits = 0x7c00;
  } else if (magnitude < 0x1p-14f) {
    bits = static_cast<uint32_t>(
        nearbyintf(magnitude * 0x1p24f));  // subnormal; the product is exact, and nearbyintf rounds it
  } else {
    bits = (u + 0xfff + (u >> 13 & 1) - (112u << 23)) >> 13;
  }
  return {static_cast<uint16_t>(bits | (signbit(f) ? 0x8000 : 0))};
}

inline float2 __half22float2(__half2 h) { return {__half2float(h.x), __half2float(h.y)}; }
inline __half2 __float22half2_rn(float2 f) { return {__float2half_rn(f.x), __float2half_rn(f.y)}; }
