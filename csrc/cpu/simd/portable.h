// The arithmetic of core/scalar.h over 4 elements at once, for any CPU. Operations that the compiler's built-in vectors
// do not have are loops over the scalar functions of core/scalar.h.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include "cpu/kernel_table.h"

#define DDPM_ISA portable

namespace ddpm_ext::portable {

using Floats = float __attribute__((vector_size(16)));
using Integers = uint32_t __attribute__((vector_size(16)));

DDPM_HD Floats broadcast(float x) { return Floats{x, x, x, x}; }
DDPM_HD Integers broadcast(uint32_t x) { return Integers{x, x, x, x}; }

}  // namespace ddpm_ext::portable

#include "cpu/simd/vector.h"

namespace ddpm_ext::portable {

// Returns the vector whose element i is f(i).
template <class Out, class Function>
DDPM_HD Out map(Function f) {
  Out out;
  for (int i = 0; i < F32::kLanes; ++i) out.v[i] = f(i);
  return out;
}

DDPM_HD F32 fma(F32 a, F32 b, F32 c) {
  return map<F32>([&](int i) { return ddpm_ext::fma(a.v[i], b.v[i], c.v[i]); });
}
DDPM_HD F32 sqrt(F32 x) {
  return map<F32>([&](int i) { return ddpm_ext::sqrt(x.v[i]); });
}
DDPM_HD F32 clamp(F32 x, F32 lo, F32 hi) {
  return map<F32>([&](int i) { return ddpm_ext::clamp(x.v[i], lo.v[i], hi.v[i]); });
}

using Words = U32;
struct __attribute__((may_alias)) Products {  // may_alias: PixelsMemory stores these as uint64_t
  uint64_t v[F32::kLanes];
};

DDPM_HD Products multiply_wide(Words a, uint32_t b) {
  return map<Products>([&](int i) { return ddpm_ext::multiply_wide(a.v[i], b); });
}
DDPM_HD Words high(Products p) {
  return map<Words>([&](int i) { return ddpm_ext::high(p.v[i]); });
}
DDPM_HD Words low(Products p) {
  return map<Words>([&](int i) { return ddpm_ext::low(p.v[i]); });
}
DDPM_HD Products operator+(Products p, uint64_t x) {
  return map<Products>([&](int i) { return p.v[i] + x; });
}
DDPM_HD Products operator+(Products p, Products q) {
  return map<Products>([&](int i) { return p.v[i] + q.v[i]; });
}
DDPM_HD Words operator^(Words a, uint32_t b) { return a.v ^ broadcast(b); }
DDPM_HD Words xor3(Words a, Words b, uint32_t c) { return Words(a.v ^ b.v) ^ c; }
DDPM_HD Words words_in_order(U32 u) { return u; }
DDPM_HD U32 join(Words w) { return w; }
DDPM_HD U32 join_high(Products p) { return high(p); }
DDPM_HD Words block_words(uint32_t first) { return U32(first) + U32(Integers{0, 1, 2, 3}); }

DDPM_HD void transpose(F32 (&z)[4]) {
  for (int i = 0; i < 4; ++i) {
    for (int k = 0; k < i; ++k) {
      const float swap = z[i].v[k];
      z[i].v[k] = z[k].v[i];
      z[k].v[i] = swap;
    }
  }
}

DDPM_HD F32 load(const float* p) {
  return map<F32>([&](int i) { return p[i]; });
}
DDPM_HD void store(float* p, F32 x) {
  for (int i = 0; i < F32::kLanes; ++i) p[i] = x.v[i];
}

DDPM_HD F32 load(const Float16* p) {
  return map<F32>([&](int i) { return c10::detail::fp16_ieee_to_fp32_value(p[i].bits); });
}
DDPM_HD void store(Float16* p, F32 x) {
  for (int i = 0; i < F32::kLanes; ++i) p[i].bits = c10::detail::fp16_ieee_from_fp32_value(x.v[i]);
}

DDPM_HD F32 load(const BFloat16* p) {
  return map<F32>([&](int i) { return c10::detail::f32_from_bits(p[i].bits); });
}
DDPM_HD void store(BFloat16* p, F32 x) {
  for (int i = 0; i < F32::kLanes; ++i) p[i].bits = c10::detail::round_to_nearest_even(x.v[i]);
}

}  // namespace ddpm_ext::portable
