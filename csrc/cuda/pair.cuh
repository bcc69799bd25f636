// The arithmetic of core/scalar.h over two elements at once. From sm_100 on, one instruction does an addition, a
// multiplication or an fma of pairs of floats. It rounds each result as the scalar instruction does.
#pragma once

#include "core/scalar.h"
#include "cuda/ptx.cuh"

namespace ddpm_ext::cuda {

// Two floats.
struct F2 {
  float2 v;
  F2() = default;
  __device__ __forceinline__ F2(float x, float y) : v{x, y} {}
  __device__ __forceinline__ explicit F2(float2 x) : v(x) {}
  __device__ __forceinline__ explicit F2(float x) : v{x, x} {}
};
// Two 32-bit words.
struct U2 {
  uint2 v;
  U2() = default;
  __device__ __forceinline__ U2(uint32_t x, uint32_t y) : v{x, y} {}
  __device__ __forceinline__ explicit U2(uint32_t x) : v{x, x} {}
};

#if __CUDA_ARCH__ >= 1000
__device__ __forceinline__ F2 operator+(F2 a, F2 b) { return F2(__fadd2_rn(a.v, b.v)); }
__device__ __forceinline__ F2 operator*(F2 a, F2 b) { return F2(__fmul2_rn(a.v, b.v)); }
__device__ __forceinline__ F2 fma(F2 a, F2 b, F2 c) { return F2(__ffma2_rn(a.v, b.v, c.v)); }
#else
__device__ __forceinline__ F2 operator+(F2 a, F2 b) { return {a.v.x + b.v.x, a.v.y + b.v.y}; }
__device__ __forceinline__ F2 operator*(F2 a, F2 b) { return {a.v.x * b.v.x, a.v.y * b.v.y}; }
__device__ __forceinline__ F2 fma(F2 a, F2 b, F2 c) { return {fmaf(a.v.x, b.v.x, c.v.x), fmaf(a.v.y, b.v.y, c.v.y)}; }
#endif

// Computes sqrt(x), rounded to nearest, by one step of Newton's method from y. The result is correct if x is finite and
// at least 2^-100, and the relative error of y, an approximation of 1/sqrt(x), is at most 2^-23.3.
__device__ __forceinline__ F2 newton_root(F2 x, F2 y) {
  const F2 root = x * y, half = y * F2(0.5f);
  return fma(fma(root * F2(-1.0f), root, x), half, root);
}

// Computes sqrt(x), rounded to nearest, if x is finite and at least 2^-100. These are the instructions of sqrt.rn
// without the call that sqrt.rn has for other numbers: if x is too small, the residual x - root^2 is not exact. NVIDIA
// guarantees only 2^-22.9 for rsqrt_approx, but correct rounding for sqrt.rn.
__device__ __forceinline__ F2 sqrt(F2 x) { return newton_root(x, {rsqrt_approx(x.v.x), rsqrt_approx(x.v.y)}); }

__device__ __forceinline__ F2 clamp(F2 x, F2 lo, F2 hi) {
  return {min_nan(max_nan(x.v.x, lo.v.x), hi.v.x), min_nan(max_nan(x.v.y, lo.v.y), hi.v.y)};
}

__device__ __forceinline__ U2 operator+(U2 a, U2 b) { return {a.v.x + b.v.x, a.v.y + b.v.y}; }
__device__ __forceinline__ U2 operator-(U2 a, U2 b) { return {a.v.x - b.v.x, a.v.y - b.v.y}; }
__device__ __forceinline__ U2 operator&(U2 a, U2 b) { return {a.v.x & b.v.x, a.v.y & b.v.y}; }
__device__ __forceinline__ U2 operator<<(U2 a, int n) { return {a.v.x << n, a.v.y << n}; }

__device__ __forceinline__ F2 bits_to_float(U2 u) { return {__uint_as_float(u.v.x), __uint_as_float(u.v.y)}; }
__device__ __forceinline__ U2 float_to_bits(F2 f) { return {__float_as_uint(f.v.x), __float_as_uint(f.v.y)}; }
__device__ __forceinline__ F2 unsigned_to_float(U2 u) {
  return {ddpm_ext::unsigned_to_float(u.v.x), ddpm_ext::unsigned_to_float(u.v.y)};
}
__device__ __forceinline__ F2 signed_to_float(U2 u) {
  return {ddpm_ext::signed_to_float(u.v.x), ddpm_ext::signed_to_float(u.v.y)};
}
__device__ __forceinline__ F2 flip_sign(F2 f, U2 u) {
  return {ddpm_ext::flip_sign(f.v.x, u.v.x), ddpm_ext::flip_sign(f.v.y, u.v.y)};
}

}  // namespace ddpm_ext::cuda
