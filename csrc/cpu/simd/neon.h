// The arithmetic of core/scalar.h over 4 elements at once, with NEON, which every AArch64 has.
#pragma once

#include <arm_neon.h>

#include "cpu/kernel_table.h"

#define DDPM_ISA neon

namespace ddpm_ext::neon {

using Floats = float32x4_t;
using Integers = uint32x4_t;

DDPM_HD Floats broadcast(float x) { return vdupq_n_f32(x); }
DDPM_HD Integers broadcast(uint32_t x) { return vdupq_n_u32(x); }

}  // namespace ddpm_ext::neon

#include "cpu/simd/vector.h"

namespace ddpm_ext::neon {

DDPM_HD F32 fma(F32 a, F32 b, F32 c) { return vfmaq_f32(c.v, a.v, b.v); }
DDPM_HD F32 sqrt(F32 x) { return vsqrtq_f32(x.v); }
DDPM_HD F32 signed_to_fraction(U32 u) { return vcvtq_n_f32_s32(vreinterpretq_s32_u32(u.v), 31); }
DDPM_HD F32 clamp(F32 x, F32 lo, F32 hi) { return vminq_f32(vmaxq_f32(x.v, lo.v), hi.v); }  // NaN stays NaN

// One instruction returns the high words of four products, and one the low words. So Philox's words stay in the order
// of the lanes, unlike on x86.
using Words = U32;
struct __attribute__((may_alias)) Products {  // may_alias: PixelsMemory stores these as uint64_t
  uint32x4_t lower, upper;                    // the products of the first two lanes, and of the last two lanes
};

DDPM_HD Products multiply_wide(Words a, uint32_t b) {
  return {vreinterpretq_u32_u64(vmull_n_u32(vget_low_u32(a.v), b)), vreinterpretq_u32_u64(vmull_high_n_u32(a.v, b))};
}
DDPM_HD Words high(Products p) { return vuzp2q_u32(p.lower, p.upper); }
DDPM_HD Words low(Products p) { return vuzp1q_u32(p.lower, p.upper); }
DDPM_HD Products operator+(Products p, Products q) {
  return {vreinterpretq_u32_u64(vaddq_u64(vreinterpretq_u64_u32(p.lower), vreinterpretq_u64_u32(q.lower))),
          vreinterpretq_u32_u64(vaddq_u64(vreinterpretq_u64_u32(p.upper), vreinterpretq_u64_u32(q.upper)))};
}
DDPM_HD Products operator+(Products p, uint64_t x) {
  using Longs = uint64_t __attribute__((vector_size(16)));
  return {uint32x4_t(Longs(p.lower) + x), uint32x4_t(Longs(p.upper) + x)};
}
DDPM_HD Words operator^(Words a, uint32_t b) { return a.v ^ broadcast(b); }
DDPM_HD Words xor3(Words a, Words b, uint32_t c) { return Words(a.v ^ b.v) ^ c; }
DDPM_HD Words words_in_order(U32 u) { return u; }
DDPM_HD U32 join(Words w) { return w; }
DDPM_HD U32 join_high(Products p) { return high(p); }

DDPM_HD Words block_words(uint32_t first) {
  const uint32_t order[] = {0, 1, 2, 3};
  return U32(first) + U32(vld1q_u32(order));
}

DDPM_HD void transpose(F32 (&z)[4]) {
  const float32x4_t a = vzip1q_f32(z[0].v, z[2].v), b = vzip1q_f32(z[1].v, z[3].v);
  const float32x4_t c = vzip2q_f32(z[0].v, z[2].v), d = vzip2q_f32(z[1].v, z[3].v);
  z[0] = vzip1q_f32(a, b);
  z[1] = vzip2q_f32(a, b);
  z[2] = vzip1q_f32(c, d);
  z[3] = vzip2q_f32(c, d);
}

DDPM_HD F32 load(const float* p) { return vld1q_f32(p); }
DDPM_HD void store(float* p, F32 x) { vst1q_f32(p, x.v); }

DDPM_HD F32 load(const Float16* p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(&p->bits))); }
DDPM_HD void store(Float16* p, F32 x) { vst1_u16(&p->bits, vreinterpret_u16_f16(vcvt_f16_f32(x.v))); }

DDPM_HD F32 load(const BFloat16* p) { return bits_to_float(vshll_n_u16(vld1_u16(&p->bits), 16)); }
DDPM_HD void store(BFloat16* p, F32 x) { vst1_u16(&p->bits, vshrn_n_u32(to_bfloat16(x).v, 16)); }

}  // namespace ddpm_ext::neon
