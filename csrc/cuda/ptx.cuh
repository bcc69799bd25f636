// Single instructions: those that CUDA C++ cannot express, and memory accesses of a fixed width.
#pragma once

#include <cstdint>

namespace ddpm_ext::cuda {

// Approximates 1/sqrt(x) within 2^-22.9 for a normal x. For such x, .ftz does not change the result but saves a check.
__device__ __forceinline__ float rsqrt_approx(float x) {
  float y;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// The larger and the smaller number. NaN stays NaN, and -0 is below 0. Before sm_80 there is no such instruction, and
// only a NaN in the first argument stays NaN.
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

// Keeps a pointer to global memory in a register. Otherwise the compiler recomputes the address at every use.
template <class T>
__device__ __forceinline__ T* in_register(T* p) {
  asm("" : "+l"(p));
  __builtin_assume(__isGlobal(p));
  return p;
}

// An access of 128 or 64 bits to global memory.
template <class Word>
__device__ __forceinline__ Word load_word(const Word* p) {
  return *p;
}
template <class Word>
__device__ __forceinline__ void store_word(Word* p, Word word) {
  *p = word;
}

// Loads if the condition holds, without a branch.
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

// Ends the thread if its noise is NaN. The noise never is, but the compiler does not know that. So all uses of loaded
// values after this call stay behind the computation of the noise, which overlaps with the loads.
__device__ __forceinline__ void keep_uses_behind(float noise) {
  asm volatile("{ .reg .pred c; setp.nan.f32 c, %0, %0; @c exit; }" : : "f"(noise));
}

// Changes nothing, but the compiler does not know that. So the value is computed before this call, and uses after it
// cannot move up.
__device__ __forceinline__ void make_opaque(uint32_t& word) { asm volatile("" : "+r"(word)); }
__device__ __forceinline__ void make_opaque(int64_t& word) { asm volatile("" : "+l"(word)); }

}  // namespace ddpm_ext::cuda
