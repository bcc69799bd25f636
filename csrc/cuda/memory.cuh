// Loads and stores: 128 bits at a time where alignment allows, else element by element by any strides. All arithmetic
// is float32.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "args.h"
#include "core/scalar.h"

namespace ddpm_ext::cuda {

__device__ __forceinline__ float to_float(float v) { return v; }
__device__ __forceinline__ float to_float(__half v) { return __half2float(v); }
__device__ __forceinline__ float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }

template <class T>
__device__ __forceinline__ T from_float(float v);
template <>
__device__ __forceinline__ float from_float<float>(float v) {
  return v;
}
template <>
__device__ __forceinline__ __half from_float<__half>(float v) {
  return __float2half_rn(v);
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float v) {
  return __float2bfloat16_rn(v);
}

// 16 bytes of T.
template <class T>
struct alignas(16) Pack {
  static constexpr int kSize = 16 / sizeof(T);
  T v[kSize];
};

template <int kItems, class T>
__device__ __forceinline__ void load_vector(const T* p, float (&x)[kItems]) {
  static_assert(kItems % Pack<T>::kSize == 0);
  DDPM_UNROLL
  for (int i = 0; i < kItems; i += Pack<T>::kSize) {
    const Pack<T> pack = *reinterpret_cast<const Pack<T>*>(p + i);
    DDPM_UNROLL
    for (int k = 0; k < Pack<T>::kSize; ++k) x[i + k] = to_float(pack.v[k]);
  }
}

template <int kItems, class T>
__device__ __forceinline__ void store_vector(T* p, const float (&x)[kItems]) {
  DDPM_UNROLL
  for (int i = 0; i < kItems; i += Pack<T>::kSize) {
    Pack<T> pack;
    DDPM_UNROLL
    for (int k = 0; k < Pack<T>::kSize; ++k) pack.v[k] = from_float<T>(x[i + k]);
    *reinterpret_cast<Pack<T>*>(p + i) = pack;
  }
}

// Where element j of a sample lies in each of its tensors.
struct Offsets {
  int64_t x = 0, model_output = 0, noise = 0, out = 0;
};

template <class Index>
__device__ __forceinline__ Offsets offsets(const Args& args, Index j) {
  Offsets o;
  DDPM_UNROLL
  for (int d = kMaxDims - 1; d >= 0; --d) {
    if (d >= args.dims) continue;
    Index i = j;
    if (d > 0) {
      const Index size = static_cast<Index>(args.sizes[d]);
      j /= size;
      i -= j * size;
    }
    o.x += i * args.x.strides[d];
    o.model_output += i * args.model_output.strides[d];
    o.noise += i * args.noise.strides[d];
    o.out += i * args.out.strides[d];
  }
  return o;
}

}  // namespace ddpm_ext::cuda
