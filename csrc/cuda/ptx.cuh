// Instructions that CUDA C++ cannot express, statements that keep the compiler from moving code, and memory accesses of
// a fixed width.
#pragma once

#include <cstdint>

namespace ddpm_ext::cuda {

// Approximates 1/sqrt(x) with a relative error of at most 2^-22.9, for an x that is not subnormal. For such an x, .ftz
// (flush to zero) does not change the result. It only spares the instructions that check for subnormal numbers.
__device__ __forceinline__ float rsqrt_approx(float x) {
  float y;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Return the larger and the smaller of two numbers. -0 is below 0. If an argument is NaN, the result is NaN. sm_75 and
// earlier do not have these instructions: there, only a NaN in the first argument makes the result NaN.
__device__ __forceinline__ float max_nan(float a, float b) {
#if __CUDA_ARCH__ >= 800
  float c;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(c) : "f"(a), "f"(b));
  return c;
#else
  return a != a ? a : fmaxf(a, b);
#endif
}
__device__ __forceinline__ float min_nan(float a, float b) {
#if __CUDA_ARCH__ >= 800
  float c;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(c) : "f"(a), "f"(b));
  return c;
#else
  return a != a ? a : fminf(a, b);
#endif
}

// Returns p, a pointer to global memory, in a register. Otherwise the compiler would compute the address at every use.
template <class T>
__device__ __forceinline__ T* in_register(T* p) {
  asm("" : "+l"(p));
  __builtin_assume(__isGlobal(p));
  return p;
}

// Load and store a word of 128, 64 or 32 bits of global memory.
template <class Word>
__device__ __forceinline__ Word load_word(const Word* p) {
  return *p;
}
template <class Word>
__device__ __forceinline__ void store_word(Word* p, Word word) {
  *p = word;
}

// Loads *p into `word` if the condition holds, without a branch.
__device__ __forceinline__ void load_word_if(bool condition, const uint4* p, uint4& word) {
  asm volatile("{ .reg .pred c; setp.ne.u32 c, %5, 0; @c ld.global.v4.u32 {%0, %1, %2, %3}, [%4]; }"
               : "+r"(word.x), "+r"(word.y), "+r"(word.z), "+r"(word.w)
               : "l"(__cvta_generic_to_global(p)), "r"(static_cast<uint32_t>(condition))
               : "memory");
}
__device__ __forceinline__ void load_word_if(bool condition, const uint2* p, uint2& word) {
  asm volatile("{ .reg .pred c; setp.ne.u32 c, %3, 0; @c ld.global.v2.u32 {%0, %1}, [%2]; }"
               : "+r"(word.x), "+r"(word.y)
               : "l"(__cvta_generic_to_global(p)), "r"(static_cast<uint32_t>(condition))
               : "memory");
}

// Ends the thread if `noise` is NaN, which never happens. But the compiler does not know that, so it cannot move later
// code before this call. So the noise is computed before the first use of loaded values, while the loads are in flight.
__device__ __forceinline__ void keep_uses_behind(float noise) {
  asm volatile("{ .reg .pred c; setp.nan.f32 c, %0, %0; @c exit; }" : : "f"(noise));
}

// Does not change `word`, but the compiler must assume that it does. So the compiler computes `word` before this call,
// and computes values that depend on `word` only after this call.
__device__ __forceinline__ void make_opaque(uint32_t& word) { asm volatile("" : "+r"(word)); }
__device__ __forceinline__ void make_opaque(int64_t& word) { asm volatile("" : "+l"(word)); }

}  // namespace ddpm_ext::cuda
