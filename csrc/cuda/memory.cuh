// Loads and stores: 128 bits at a time where alignment allows, else element by element by any strides. All arithmetic
// is float32.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

#include "args.h"
#include "cuda/pair.cuh"

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

__device__ __forceinline__ F2 widen(float2 v) { return F2(v); }
__device__ __forceinline__ F2 widen(__half2 v) { return F2(__half22float2(v)); }
__device__ __forceinline__ F2 widen(__nv_bfloat162 v) { return F2(__bfloat1622float2(v)); }

__device__ __forceinline__ void narrow(F2 f, float2& v) { v = f.v; }
__device__ __forceinline__ void narrow(F2 f, __half2& v) { v = __float22half2_rn(f.v); }
__device__ __forceinline__ void narrow(F2 f, __nv_bfloat162& v) { v = __float22bfloat162_rn(f.v); }

template <class T>
struct PairOf;
template <>
struct PairOf<float> {
  using Type = float2;
};
template <>
struct PairOf<__half> {
  using Type = __half2;
};
template <>
struct PairOf<__nv_bfloat16> {
  using Type = __nv_bfloat162;
};

// kItems neighbours as they lie in memory, in words of 128 bits, or one of 64.
template <class T, int kItems>
struct Vector {
  using Pair = typename PairOf<T>::Type;
  using Word = std::conditional_t<kItems * sizeof(T) == 8, uint2, uint4>;
  static constexpr int kWords = kItems * sizeof(T) / sizeof(Word);
  static_assert(kWords * sizeof(Word) == kItems * sizeof(T));
  Pair pairs[kItems / 2];

  __device__ __forceinline__ void load(const T* p) {
    Word words[kWords];
    DDPM_UNROLL
    for (int i = 0; i < kWords; ++i) words[i] = reinterpret_cast<const Word*>(p)[i];
    memcpy(pairs, words, sizeof words);
  }
  __device__ __forceinline__ void store(T* p) const {
    Word words[kWords];
    memcpy(words, pairs, sizeof words);
    DDPM_UNROLL
    for (int i = 0; i < kWords; ++i) reinterpret_cast<Word*>(p)[i] = words[i];
  }
};

// Where element j of a sample lies in each of its tensors.
struct Offsets {
  int64_t x = 0, model_output = 0, noise = 0, out = 0;

  __device__ __forceinline__ void add(const Args& args, int d, int64_t n) {
    x += n * args.x.strides[d];
    model_output += n * args.model_output.strides[d];
    noise += n * args.noise.strides[d];
    out += n * args.out.strides[d];
  }
};

// Division of j < 2^34 by a size of 2 or more: a multiplication and a shift, since a GPU divides by a long routine.
// With 2^(s-1) < size <= 2^s, magic exceeds 2^(63+s) / size by at most 1, so the quotient's error is below j 2^-(63+s),
// less than the 1/size that would matter.
struct Divider {
  uint64_t magic = 0;
  int shift = 0;

  Divider() = default;
  explicit Divider(int64_t size) {
    int s = 1;
    while ((int64_t{1} << s) < size) ++s;
    magic = static_cast<uint64_t>((static_cast<unsigned __int128>(1) << (63 + s)) / static_cast<uint64_t>(size)) + 1;
    shift = s - 1;
  }
  __device__ __forceinline__ uint64_t quotient(uint64_t j) const { return __umul64hi(j, magic) >> shift; }
};

struct Dividers {
  Divider by[kMaxDims];  // by[0]: a quotient of 0, nothing counts on

  explicit Dividers(const Call& args) {
    for (int d = 1; d < args.dims; ++d) by[d] = Divider(args.sizes[d]);
  }
};

// `left`: how many elements there are from j on before a dimension but the last counts on.
__device__ __forceinline__ Offsets offsets(const Args& args, const Dividers& dividers, int64_t j, int64_t& left) {
  Offsets o;
  left = args.numel - j;
  for (int d = args.dims - 1; d > 0; --d) {
    const int64_t quotient = static_cast<int64_t>(dividers.by[d].quotient(static_cast<uint64_t>(j)));
    const int64_t index = j - quotient * args.sizes[d];
    if (d == args.dims - 1) left = args.sizes[d] - index;
    o.add(args, d, index);
    j = quotient;
  }
  o.add(args, 0, j);
  return o;
}

// Calls add(d, index) for each dimension of a sample's element j: once for all tensors that it is in.
template <class Add>
__device__ __forceinline__ void for_each_index(const Call& args, const Dividers& dividers, int64_t j, Add add) {
#pragma unroll 1
  for (int d = args.dims - 1; d >= 0; --d) {
    const int64_t quotient = static_cast<int64_t>(dividers.by[d].quotient(static_cast<uint64_t>(j)));
    add(d, j - quotient * args.sizes[d]);
    j = quotient;
  }
}

}  // namespace ddpm_ext::cuda
