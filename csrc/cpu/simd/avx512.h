// The arithmetic of core/scalar.h over 16 elements at once, with AVX-512 F and DQ.
#pragma once

#include <immintrin.h>

#include "cpu/kernel_table.h"

namespace ddpm_ext::avx512 {

struct F32 {
  static constexpr int kLanes = 16;
  __m512 v;
  F32() = default;
  F32(__m512 x) : v(x) {}
  explicit F32(float x) : v(_mm512_set1_ps(x)) {}
};
struct U32 {
  __m512i v;
  U32() = default;
  U32(__m512i x) : v(x) {}
  explicit U32(uint32_t x) : v(_mm512_set1_epi32(static_cast<int>(x))) {}
};

DDPM_HD F32 operator+(F32 a, F32 b) { return _mm512_add_ps(a.v, b.v); }
DDPM_HD F32 operator*(F32 a, F32 b) { return _mm512_mul_ps(a.v, b.v); }
DDPM_HD F32 fma(F32 a, F32 b, F32 c) { return _mm512_fmadd_ps(a.v, b.v, c.v); }
DDPM_HD F32 sqrt(F32 x) { return _mm512_sqrt_ps(x.v); }
DDPM_HD F32 clamp(F32 x, F32 lo, F32 hi) { return _mm512_min_ps(hi.v, _mm512_max_ps(lo.v, x.v)); }  // NaN stays NaN

DDPM_HD U32 operator+(U32 a, U32 b) { return _mm512_add_epi32(a.v, b.v); }
DDPM_HD U32 operator-(U32 a, U32 b) { return _mm512_sub_epi32(a.v, b.v); }
DDPM_HD U32 operator&(U32 a, U32 b) { return _mm512_and_si512(a.v, b.v); }
DDPM_HD U32 operator<<(U32 a, int n) { return _mm512_slli_epi32(a.v, n); }

DDPM_HD F32 bits_to_float(U32 u) { return _mm512_castsi512_ps(u.v); }
DDPM_HD U32 float_to_bits(F32 f) { return _mm512_castps_si512(f.v); }
DDPM_HD F32 unsigned_to_float(U32 u) { return _mm512_cvtepu32_ps(u.v); }
DDPM_HD F32 signed_to_float(U32 u) { return _mm512_cvtepi32_ps(u.v); }
DDPM_HD F32 flip_sign(F32 f, U32 u) {
  const __m512i sign = _mm512_set1_epi32(static_cast<int>(0x80000000u));
  return bits_to_float(_mm512_ternarylogic_epi32(float_to_bits(f).v, u.v, sign, 0x78));  // f ^ (u & sign)
}

// 16 words of Philox's state. Even and odd words are in separate registers, each in the low half of a 64-bit lane whose
// upper half is never read. So the low word of a product needs no instruction, and its high word needs one shift.
struct Words {
  __m512i even, odd;
  Words() = default;
  Words(__m512i e, __m512i o) : even(e), odd(o) {}
  explicit Words(uint32_t x) : even(_mm512_set1_epi32(static_cast<int>(x))), odd(even) {}
};
struct Products {
  __m512i even, odd;
};

DDPM_HD Products multiply_wide(Words a, uint32_t b) {
  const __m512i m = _mm512_set1_epi32(static_cast<int>(b));
  return {_mm512_mul_epu32(a.even, m), _mm512_mul_epu32(a.odd, m)};
}
DDPM_HD Words high(Products p) { return {_mm512_srli_epi64(p.even, 32), _mm512_srli_epi64(p.odd, 32)}; }
DDPM_HD Words low(Products p) { return {p.even, p.odd}; }
DDPM_HD Words operator^(Words a, uint32_t b) {
  const __m512i k = _mm512_set1_epi32(static_cast<int>(b));
  return {_mm512_xor_si512(a.even, k), _mm512_xor_si512(a.odd, k)};
}
DDPM_HD Words xor3(Words a, Words b, uint32_t c) {
  const __m512i k = _mm512_set1_epi32(static_cast<int>(c));
  return {_mm512_ternarylogic_epi32(a.even, b.even, k, 0x96), _mm512_ternarylogic_epi32(a.odd, b.odd, k, 0x96)};
}
DDPM_HD U32 join(Words w) { return _mm512_mask_shuffle_epi32(w.even, 0xAAAA, w.odd, static_cast<_MM_PERM_ENUM>(0xA0)); }

// The numbers of 16 consecutive blocks, in those lanes from which transpose() puts the elements into memory order.
DDPM_HD Words block_words(uint32_t first) {
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  const __m512i blocks = _mm512_add_epi32(_mm512_set1_epi32(static_cast<int>(first)), order);
  return {blocks, _mm512_srli_epi64(blocks, 32)};
}

// Before, z[k] holds element k of every block. Afterwards it holds elements 16 k to 16 k + 15 of the 64.
DDPM_HD void transpose(F32 (&z)[4]) {
  const __m512d a = _mm512_castps_pd(_mm512_unpacklo_ps(z[0].v, z[1].v));
  const __m512d b = _mm512_castps_pd(_mm512_unpacklo_ps(z[2].v, z[3].v));
  const __m512d c = _mm512_castps_pd(_mm512_unpackhi_ps(z[0].v, z[1].v));
  const __m512d d = _mm512_castps_pd(_mm512_unpackhi_ps(z[2].v, z[3].v));
  z[0] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
  z[1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
  z[2] = _mm512_castpd_ps(_mm512_unpacklo_pd(c, d));
  z[3] = _mm512_castpd_ps(_mm512_unpackhi_pd(c, d));
}

DDPM_HD F32 load(const float* p) { return _mm512_loadu_ps(p); }
DDPM_HD void store(float* p, F32 x) { _mm512_storeu_ps(p, x.v); }

DDPM_HD F32 load(const Float16* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
DDPM_HD void store(Float16* p, F32 x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT));
}

DDPM_HD F32 load(const BFloat16* p) {
  const __m256i raw = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16));
}
DDPM_HD void store(BFloat16* p, F32 x) {  // rounds to nearest even; any NaN becomes the quiet one
  const __m512i bits = _mm512_castps_si512(x.v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
  const __mmask16 nan = _mm512_cmp_ps_mask(x.v, x.v, _CMP_UNORD_Q);
  const __m512i result = _mm512_mask_mov_epi32(_mm512_srli_epi32(rounded, 16), nan, _mm512_set1_epi32(0x7fc0));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(result));
}

}  // namespace ddpm_ext::avx512
