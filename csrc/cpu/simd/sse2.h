// The arithmetic of core/scalar.h over 4 elements at once, with SSE2, which every x86-64 has. SSE2 has no fma
// instruction, so fma is computed in double.
#pragma once

#include <c10/util/Half.h>
#include <emmintrin.h>

#include "cpu/kernel_table.h"

#define DDPM_ISA sse2

namespace ddpm_ext::sse2 {

using Floats = __m128;
using Integers = __m128i;

DDPM_HD Floats broadcast(float x) { return _mm_set1_ps(x); }
DDPM_HD Integers broadcast(uint32_t x) { return _mm_set1_epi32(static_cast<int>(x)); }
DDPM_HD Integers multiply_even(Integers a, Integers b) { return _mm_mul_epu32(a, b); }
// The caller computes a last. In this order, b ^ c need not wait for a.
DDPM_HD Integers xor3(Integers a, Integers b, Integers c) { return a ^ (b ^ c); }
template <int kWords>
DDPM_HD Floats shuffle(Floats a, Floats b) {
  return _mm_shuffle_ps(a, b, kWords);
}

}  // namespace ddpm_ext::sse2

#include "cpu/simd/x86.h"

namespace ddpm_ext::sse2 {

DDPM_HD F32 sqrt(F32 x) { return _mm_sqrt_ps(x.v); }
DDPM_HD F32 clamp(F32 x, F32 lo, F32 hi) { return _mm_min_ps(hi.v, _mm_max_ps(lo.v, x.v)); }  // NaN stays NaN

DDPM_HD F32 upper_half(F32 x) { return _mm_movehl_ps(x.v, x.v); }

// Returns a b + c for the lower two lanes, in double and rounded to odd (core/fma_by_double.h).
DDPM_HD __m128d fma_to_odd(F32 a, F32 b, F32 c_) {
  const __m128d p = _mm_mul_pd(_mm_cvtps_pd(a.v), _mm_cvtps_pd(b.v)), c = _mm_cvtps_pd(c_.v), sum = _mm_add_pd(p, c);
  const __m128d rounded_c = _mm_sub_pd(sum, p), zero = _mm_setzero_pd();
  const __m128d e = _mm_add_pd(_mm_sub_pd(p, _mm_sub_pd(sum, rounded_c)), _mm_sub_pd(c, rounded_c));
  const __m128d rounded = _mm_or_pd(_mm_cmplt_pd(e, zero), _mm_cmplt_pd(zero, e));  // false if e is NaN
  const __m128i one = _mm_srli_epi64(_mm_castpd_si128(rounded), 63);
  const __m128i away = _mm_and_si128(_mm_srli_epi64(_mm_castpd_si128(_mm_xor_pd(sum, e)), 63), one);
  return _mm_castsi128_pd(_mm_or_si128(_mm_sub_epi64(_mm_castpd_si128(sum), away), one));
}

// Returns fma(a, b, c), correctly rounded. It is not inlined, since fma is inlined everywhere and seldom calls it.
__attribute__((noinline, cold)) inline F32 rare_fma(F32 a, F32 b, F32 c) {
  const __m128d lower = fma_to_odd(a, b, c), upper = fma_to_odd(upper_half(a), upper_half(b), upper_half(c));
  return _mm_movelh_ps(_mm_cvtpd_ps(lower), _mm_cvtpd_ps(upper));
}

// Returns fma(a, b, c). It rounds twice, to double and then to float. The result can be wrong only where the double
// lies halfway between two floats. Then the last 29 bits of the double are 0x10000000, or the result is at most 2^-126:
// halfway between 2^-126 and the largest subnormal float, the double is rounded to 2^-126. In these cases rare_fma
// computes the result.
DDPM_HD F32 fma(F32 a, F32 b, F32 c) {
  const auto sum = [](F32 x, F32 y, F32 z) {
    return _mm_add_pd(_mm_mul_pd(_mm_cvtps_pd(x.v), _mm_cvtps_pd(y.v)), _mm_cvtps_pd(z.v));
  };
  const __m128d lower = sum(a, b, c), upper = sum(upper_half(a), upper_half(b), upper_half(c));
  const F32 result = _mm_movelh_ps(_mm_cvtpd_ps(lower), _mm_cvtpd_ps(upper));
  const __m128i last = _mm_castps_si128(_mm_shuffle_ps(_mm_castpd_ps(lower), _mm_castpd_ps(upper), 0x88));
  const __m128i halfway = _mm_cmpeq_epi32(_mm_and_si128(last, _mm_set1_epi32(0x1fffffff)), _mm_set1_epi32(0x10000000));
  const __m128i size = _mm_and_si128(_mm_castps_si128(result.v), _mm_set1_epi32(0x7fffffff));
  const __m128i small = _mm_cmplt_epi32(size, _mm_set1_epi32(0x00800001));
  if (__builtin_expect(_mm_movemask_epi8(_mm_or_si128(halfway, small)) != 0, 0)) return rare_fma(a, b, c);
  return result;
}

// The numbers of 4 consecutive blocks, one for each lane. In this order of lanes, join() and transpose() return the
// elements in the order of memory.
DDPM_HD Words block_words(uint32_t first) { return Words(U32(first) + U32(_mm_setr_epi32(0, 2, 1, 3))); }

DDPM_HD F32 load(const float* p) { return _mm_loadu_ps(p); }
DDPM_HD void store(float* p, F32 x) { _mm_storeu_ps(p, x.v); }

DDPM_HD F32 load(const Float16* p) {
  float x[F32::kLanes];
  for (int i = 0; i < F32::kLanes; ++i) x[i] = c10::detail::fp16_ieee_to_fp32_value(p[i].bits);
  return load(x);
}
DDPM_HD void store(Float16* p, F32 x) {
  float values[F32::kLanes];
  store(values, x);
  for (int i = 0; i < F32::kLanes; ++i) p[i].bits = c10::detail::fp16_ieee_from_fp32_value(values[i]);
}

DDPM_HD F32 load(const BFloat16* p) {
  const __m128i raw = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
  return _mm_castsi128_ps(_mm_unpacklo_epi16(_mm_setzero_si128(), raw));
}
DDPM_HD void store(BFloat16* p, F32 x) {
  const __m128i upper = _mm_srai_epi32(to_bfloat16(x).v, 16);  // a signed shift, so that _mm_packs keeps the bits
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packs_epi32(upper, upper));
}

}  // namespace ddpm_ext::sse2
