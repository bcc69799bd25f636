// Single instructions: those that CUDA C++ cannot express, and the accesses to memory whose number counts.
#pragma once

#include <cstdint>

namespace ddpm_ext::cuda {

// Approximates 1/sqrt(x) within 2^-22.9 for a normal x. For such numbers .ftz changes nothing but saves a check.
__device__ __forceinline__ float rsqrt_approx(float x) {
  float y;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// The larger and the smaller number. NaN stays NaN, and -0 is below 0. Before sm_80 there is no such instruction, and
// only a NaN of the first argument stays.
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

// Keeps a pointer to global memory in a register. Otherwise the compiler computes the address anew at every use.
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

// Ends the thread if its noise is NaN. No noise is, but the compiler does not know that. So it leaves all uses of
// loaded values that come behind this behind the noise, during which the loads are under way.
__device__ __forceinline__ void keep_uses_behind(float noise) {
  asm volatile("{ .reg .pred c; setp.nan.f32 c, %0, %0; @c exit; }" : : "f"(noise));
}

// Changes nothing, which the compiler does not know. So the value is computed before, and its uses come after.
__device__ __forceinline__ void make_opaque(uint32_t& word) { asm volatile("" : "+r"(word)); }
__device__ __forceinline__ void make_opaque(int64_t& word) { asm volatile("" : "+l"(word)); }

}  // namespace ddpm_ext::cuda
