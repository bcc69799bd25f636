// Loads and stores of words of several elements, and of single elements at any strides. Values are converted to and
// from float32, in which the arithmetic of an element is done.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

#include "call.h"
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

// PairOf<T>::Type is CUDA's type of two elements of type T.
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

// kItems elements in registers, as pairs. If they are contiguous in memory, they are loaded and stored as a word of
// 128, 64 or 32 bits.
template <class T, int kItems>
struct Vector {
  using Pair = typename PairOf<T>::Type;
  static constexpr int kBytes = kItems * sizeof(T);
  using Word = std::conditional_t<kBytes == 4, uint32_t, std::conditional_t<kBytes == 8, uint2, uint4>>;
  static_assert(sizeof(Word) == kBytes);
  Pair pairs[kItems / 2];

  __device__ __forceinline__ void load(const T* p) {
    const Word word = load_word(reinterpret_cast<const Word*>(p));
    memcpy(pairs, &word, sizeof word);
  }
  __device__ __forceinline__ void load_if(bool condition, const T* p) {
    Word word;
    memcpy(&word, pairs, sizeof word);
    load_word_if(condition, reinterpret_cast<const Word*>(p), word);
    memcpy(pairs, &word, sizeof word);
  }
  // Makes the compiler hold the elements as packed words up to this point. Otherwise it would convert 16-bit elements
  // to float32 at the start of a loop iteration, which takes more registers.
  __device__ __forceinline__ void unpack_from_here() {
    uint32_t words[kBytes / 4];
    memcpy(words, pairs, sizeof words);
    DDPM_UNROLL
    for (uint32_t& word : words) make_opaque(word);
    memcpy(pairs, words, sizeof words);
  }
  __device__ __forceinline__ void store(T* p) const {
    Word word;
    memcpy(&word, pairs, sizeof word);
    store_word(reinterpret_cast<Word*>(p), word);
  }
  // gather loads, and scatter stores, the elements one by one. They are `stride` elements apart in memory. scatter
  // stores only the first `count` of them.
  __device__ __forceinline__ void gather(const T* p, int64_t stride) {
    T values[kItems];
    DDPM_UNROLL
    for (int i = 0; i < kItems; ++i) values[i] = p[i * stride];
    memcpy(pairs, values, sizeof values);
  }
  __device__ __forceinline__ void scatter(T* p, int64_t stride, int count = kItems) const {
    T values[kItems];
    memcpy(values, pairs, sizeof values);
    DDPM_UNROLL
    for (int i = 0; i < kItems; ++i)
      if (i < count) p[i * stride] = values[i];
  }
};

// The offset of one element from the start of its sample, in each tensor of a call.
struct Offsets {
  int64_t x = 0, model_output = 0, noise = 0, out = 0;

  __device__ __forceinline__ void add(const ElementwiseCall& call, int d, int64_t n) {
    x += n * call.x.strides[d];
    model_output += n * call.model_output.strides[d];
    noise += n * call.noise.strides[d];
    out += n * call.out.strides[d];
  }
};

// Divides j < 2^34 by a size of 2 or more with a multiplication and a shift, since a GPU has no instruction for integer
// division. With 2^(s-1) < size <= 2^s, `magic` exceeds 2^(63+s) / size by at most 1. So j magic 2^-(63+s) exceeds
// j / size by at most j 2^-(63+s). That is less than 1 / size, the least error that could change the rounded quotient.
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

// Divides by each of a sample's sizes but the first one: by[d] divides by sizes[d]. by[0] gives a quotient of 0.
struct Dividers {
  Divider by[kMaxDims];

  explicit Dividers(const Call& call) {
    for (int d = 1; d < call.dims; ++d) by[d] = Divider(call.sizes[d]);
  }
};

// Calls add(d, index) with the index of a sample's element j in each dimension d. `add` can add to the offsets of
// several tensors, so that the divisions are done only once.
template <class Add>
__device__ __forceinline__ void for_each_index(const Call& call, const Dividers& dividers, int64_t j, Add add) {
#pragma unroll 1
  for (int d = call.dims - 1; d >= 0; --d) {
    const int64_t quotient = static_cast<int64_t>(dividers.by[d].quotient(static_cast<uint64_t>(j)));
    add(d, j - quotient * call.sizes[d]);
    j = quotient;
  }
}

// Returns the offsets of element j of a sample.
__device__ __forceinline__ Offsets offsets(const ElementwiseCall& call, const Dividers& dividers, int64_t j) {
  Offsets o;
  for_each_index(call, dividers, j, [&](int d, int64_t index) { o.add(call, d, index); });
  return o;
}

// Whether the elements j to j + count - 1 of a sample are neighbours along the last dimension: they differ only in the
// last index.
__device__ __forceinline__ bool in_row(const Call& call, const Dividers& dividers, int64_t j, int count) {
  const int d = call.dims - 1;
  if (d < 0) return false;
  const int64_t row = static_cast<int64_t>(dividers.by[d].quotient(static_cast<uint64_t>(j)));
  return j + count <= (row + 1) * call.sizes[d];
}

}  // namespace ddpm_ext::cuda
