// Instructions that CUDA C++ cannot express.
#pragma once

namespace ddpm_ext::cuda {

// Approximates 1/sqrt(x) within 2^-22.9 for a normal x. For such numbers .ftz changes nothing but saves a check.
__device__ __forceinline__ float rsqrt_approx(float x) {
  float y;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// The larger and the smaller number. NaN stays NaN, and -0 is below 0. Before sm_80 there is no such instruction.
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

}  // namespace ddpm_ext::cuda
