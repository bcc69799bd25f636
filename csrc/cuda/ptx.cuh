// The instructions that CUDA C++ has no word for.
#pragma once

namespace ddpm_ext::cuda {

// 1/sqrt(x) within 2^-22.9, of a normal x: .ftz would only save the check for others.
__device__ __forceinline__ float rsqrt_approx(float x) {
  float y;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// NaN passes, and -0 is below 0. Before sm_80 there is no such instruction.
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

// p to global memory, computed once: else the compiler puts the address together anew wherever it is used.
template <class T>
__device__ __forceinline__ T* in_register(T* p) {
  asm("" : "+l"(p));
  __builtin_assume(__isGlobal(p));
  return p;
}

}  // namespace ddpm_ext::cuda
