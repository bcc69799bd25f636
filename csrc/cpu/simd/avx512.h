// The arithmetic of core/scalar.h over 16 elements at once, with AVX-512 F and DQ.
#pragma once

#include <immintrin.h>

#include "cpu/kernel_table.h"

#define DDPM_ISA avx512

namespace ddpm_ext::avx512 {

using Floats = __m512;
using Integers = __m512i;

DDPM_HD Floats broadcast(float x) { return _mm512_set1_ps(x); }
DDPM_HD Integers broadcast(uint32_t x) { return _mm512_set1_epi32(static_cast<int>(x)); }
DDPM_HD Integers multiply_even(Integers a, Integers b) { return _mm512_mul_epu32(a, b); }
DDPM_HD Integers xor3(Integers a, Integers b, Integers c) {  // of which compilers make two instructions
  return _mm512_ternarylogic_epi32(a, b, c, 0x96);
}
template <int kWords>
DDPM_HD Integers shuffle(Integers a, Integers b) {
  return _mm512_castps_si512(_mm512_shuffle_ps(_mm512_castsi512_ps(a), _mm512_castsi512_ps(b), kWords));
}

}  // namespace ddpm_ext::avx512

#include "cpu/simd/x86.h"

namespace ddpm_ext::avx512 {

DDPM_HD F32 fma(F32 a, F32 b, F32 c) { return _mm512_fmadd_ps(a.v, b.v, c.v); }
DDPM_HD F32 sqrt(F32 x) { return _mm512_sqrt_ps(x.v); }
DDPM_HD F32 clamp(F32 x, F32 lo, F32 hi) { return _mm512_min_ps(hi.v, _mm512_max_ps(lo.v, x.v)); }  // NaN stays NaN

// The numbers of 16 consecutive blocks, in those lanes from which join() and transpose() put the elements into memory
// order.
DDPM_HD Words block_words(uint32_t first) {
  return Words(U32(first) + U32(_mm512_setr_epi32(0, 8, 4, 12, 1, 9, 5, 13, 2, 10, 6, 14, 3, 11, 7, 15)));
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
  const U32 raw = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return bits_to_float(raw << 16);
}
DDPM_HD void store(BFloat16* p, F32 x) {
  const __m512i rounded = _mm512_srli_epi32(to_bfloat16(x).v, 16);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(rounded));
}

}  // namespace ddpm_ext::avx512
