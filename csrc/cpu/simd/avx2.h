// The arithmetic of core/scalar.h over 8 elements at once, with AVX2, FMA and F16C. The layout of Philox's words is
// explained in avx512.h.
#pragma once

#include <immintrin.h>

#include "cpu/kernel_table.h"

namespace ddpm_ext::avx2 {

struct F32 {
  static constexpr int kLanes = 8;
  __m256 v;
  F32() = default;
  F32(__m256 x) : v(x) {}
  explicit F32(float x) : v(_mm256_set1_ps(x)) {}
};
struct U32 {
  __m256i v;
  U32() = default;
  U32(__m256i x) : v(x) {}
  explicit U32(uint32_t x) : v(_mm256_set1_epi32(static_cast<int>(x))) {}
};

DDPM_HD F32 operator+(F32 a, F32 b) { return _mm256_add_ps(a.v, b.v); }
DDPM_HD F32 operator*(F32 a, F32 b) { return _mm256_mul_ps(a.v, b.v); }
DDPM_HD F32 fma(F32 a, F32 b, F32 c) { return _mm256_fmadd_ps(a.v, b.v, c.v); }
DDPM_HD F32 sqrt(F32 x) { return _mm256_sqrt_ps(x.v); }
DDPM_HD F32 clamp(F32 x, F32 lo, F32 hi) { return _mm256_min_ps(hi.v, _mm256_max_ps(lo.v, x.v)); }  // NaN stays NaN

DDPM_HD U32 operator+(U32 a, U32 b) { return _mm256_add_epi32(a.v, b.v); }
DDPM_HD U32 operator-(U32 a, U32 b) { return _mm256_sub_epi32(a.v, b.v); }
DDPM_HD U32 operator&(U32 a, U32 b) { return _mm256_and_si256(a.v, b.v); }
DDPM_HD U32 operator<<(U32 a, int n) { return _mm256_slli_epi32(a.v, n); }

DDPM_HD F32 bits_to_float(U32 u) { return _mm256_castsi256_ps(u.v); }
DDPM_HD U32 float_to_bits(F32 f) { return _mm256_castps_si256(f.v); }
DDPM_HD F32 signed_to_float(U32 u) { return _mm256_cvtepi32_ps(u.v); }
DDPM_HD F32 unsigned_to_float(U32 u) {  // both halves are exact, so that only the fma rounds
  const F32 upper = signed_to_float(_mm256_srli_epi32(u.v, 16));
  const F32 lower = signed_to_float(_mm256_and_si256(u.v, _mm256_set1_epi32(0xffff)));
  return fma(upper, F32(65536.0f), lower);
}
DDPM_HD F32 flip_sign(F32 f, U32 u) {
  const __m256i sign = _mm256_set1_epi32(static_cast<int>(0x80000000u));
  return bits_to_float(_mm256_xor_si256(float_to_bits(f).v, _mm256_and_si256(u.v, sign)));
}

struct Words {
  __m256i even, odd;
  Words() = default;
  Words(__m256i e, __m256i o) : even(e), odd(o) {}
  explicit Words(uint32_t x) : even(_mm256_set1_epi32(static_cast<int>(x))), odd(even) {}
};
struct Products {
  __m256i even, odd;
};

DDPM_HD Products multiply_wide(Words a, uint32_t b) {
  const __m256i m = _mm256_set1_epi32(static_cast<int>(b));
  return {_mm256_mul_epu32(a.even, m), _mm256_mul_epu32(a.odd, m)};
}
DDPM_HD Words high(Products p) { return {_mm256_srli_epi64(p.even, 32), _mm256_srli_epi64(p.odd, 32)}; }
DDPM_HD Words low(Products p) { return {p.even, p.odd}; }
DDPM_HD Words operator^(Words a, uint32_t b) {
  const __m256i k = _mm256_set1_epi32(static_cast<int>(b));
  return {_mm256_xor_si256(a.even, k), _mm256_xor_si256(a.odd, k)};
}
DDPM_HD Words xor3(Words a, Words b, uint32_t c) {
  return Words(_mm256_xor_si256(a.even, b.even), _mm256_xor_si256(a.odd, b.odd)) ^ c;
}
DDPM_HD U32 join(Words w) { return _mm256_blend_epi32(w.even, _mm256_shuffle_epi32(w.odd, 0xA0), 0xAA); }

DDPM_HD Words block_words(uint32_t first) {
  const __m256i order = _mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7);
  const __m256i blocks = _mm256_add_epi32(_mm256_set1_epi32(static_cast<int>(first)), order);
  return {blocks, _mm256_srli_epi64(blocks, 32)};
}

DDPM_HD void transpose(F32 (&z)[4]) {
  const __m256d a = _mm256_castps_pd(_mm256_unpacklo_ps(z[0].v, z[1].v));
  const __m256d b = _mm256_castps_pd(_mm256_unpacklo_ps(z[2].v, z[3].v));
  const __m256d c = _mm256_castps_pd(_mm256_unpackhi_ps(z[0].v, z[1].v));
  const __m256d d = _mm256_castps_pd(_mm256_unpackhi_ps(z[2].v, z[3].v));
  z[0] = _mm256_castpd_ps(_mm256_unpacklo_pd(a, b));
  z[1] = _mm256_castpd_ps(_mm256_unpackhi_pd(a, b));
  z[2] = _mm256_castpd_ps(_mm256_unpacklo_pd(c, d));
  z[3] = _mm256_castpd_ps(_mm256_unpackhi_pd(c, d));
}

DDPM_HD F32 load(const float* p) { return _mm256_loadu_ps(p); }
DDPM_HD void store(float* p, F32 x) { _mm256_storeu_ps(p, x.v); }

DDPM_HD F32 load(const Float16* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
DDPM_HD void store(Float16* p, F32 x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT));
}

DDPM_HD F32 load(const BFloat16* p) {
  const __m128i raw = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(raw), 16));
}
DDPM_HD void store(BFloat16* p, F32 x) {  // rounds to nearest even; any NaN becomes the quiet one
  const __m256i bits = _mm256_castps_si256(x.v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x.v, x.v, _CMP_UNORD_Q));
  const __m256i result = _mm256_blendv_epi8(_mm256_srli_epi32(rounded, 16), _mm256_set1_epi32(0x7fc0), nan);
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(result, result), 0x08);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
}

}  // namespace ddpm_ext::avx2
