// The arithmetic of core/scalar.h over 8 elements at once, with AVX2, FMA and F16C.
#pragma once

#include <immintrin.h>

#include "cpu/kernel_table.h"

#define DDPM_ISA avx2

namespace ddpm_ext::avx2 {

using Floats = __m256;
using Integers = __m256i;

DDPM_HD Floats broadcast(float x) { return _mm256_set1_ps(x); }
DDPM_HD Integers broadcast(uint32_t x) { return _mm256_set1_epi32(static_cast<int>(x)); }
DDPM_HD Integers multiply_even(Integers a, Integers b) { return _mm256_mul_epu32(a, b); }
// The caller computes a last. In this order, b ^ c need not wait for a.
DDPM_HD Integers xor3(Integers a, Integers b, Integers c) { return a ^ (b ^ c); }
template <int kWords>
DDPM_HD Floats shuffle(Floats a, Floats b) {
  return _mm256_shuffle_ps(a, b, kWords);
}

}  // namespace ddpm_ext::avx2

#include "cpu/simd/x86.h"

namespace ddpm_ext::avx2 {

DDPM_HD F32 fma(F32 a, F32 b, F32 c) { return _mm256_fmadd_ps(a.v, b.v, c.v); }
DDPM_HD F32 sqrt(F32 x) { return _mm256_sqrt_ps(x.v); }
DDPM_HD F32 clamp(F32 x, F32 lo, F32 hi) { return _mm256_min_ps(hi.v, _mm256_max_ps(lo.v, x.v)); }  // NaN stays NaN

// The numbers of 8 consecutive blocks, one for each lane. In this order of lanes, join() and transpose() return the
// elements in the order of memory.
DDPM_HD Words block_words(uint32_t first) { return Words(U32(first) + U32(_mm256_setr_epi32(0, 4, 2, 6, 1, 5, 3, 7))); }

DDPM_HD F32 load(const float* p) { return _mm256_loadu_ps(p); }
DDPM_HD void store(float* p, F32 x) { _mm256_storeu_ps(p, x.v); }

DDPM_HD F32 load(const Float16* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
DDPM_HD void store(Float16* p, F32 x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT));
}

DDPM_HD F32 load(const BFloat16* p) {
  const U32 raw = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return bits_to_float(raw << 16);
}
DDPM_HD void store(BFloat16* p, F32 x) {
  const __m256i rounded = _mm256_srli_epi32(to_bfloat16(x).v, 16);
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(rounded, rounded), 0x08);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
}

}  // namespace ddpm_ext::avx2
