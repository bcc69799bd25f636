// The arithmetic of core/scalar.h over 16 elements at once, with AVX-512 F, DQ and BW.
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
DDPM_HD Integers xor3(Integers a, Integers b, Integers c) {  // for a ^ b ^ c, compilers emit two instructions
  return _mm512_ternarylogic_epi32(a, b, c, 0x96);
}
template <int kWords>
DDPM_HD Floats shuffle(Floats a, Floats b) {
  return _mm512_shuffle_ps(a, b, kWords);
}

}  // namespace ddpm_ext::avx512

#include "cpu/simd/x86.h"

namespace ddpm_ext::avx512 {

DDPM_HD F32 fma(F32 a, F32 b, F32 c) { return _mm512_fmadd_ps(a.v, b.v, c.v); }
DDPM_HD F32 sqrt(F32 x) { return _mm512_sqrt_ps(x.v); }
DDPM_HD F32 clamp(F32 x, F32 lo, F32 hi) { return _mm512_min_ps(hi.v, _mm512_max_ps(lo.v, x.v)); }  // NaN stays NaN

// The numbers of 16 consecutive blocks, one for each lane. In this order of lanes, join() and transpose() return the
// elements in the order of memory.
DDPM_HD Words block_words(uint32_t first) {
  return Words(U32(first) + U32(_mm512_setr_epi32(0, 8, 4, 12, 1, 9, 5, 13, 2, 10, 6, 14, 3, 11, 7, 15)));
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
