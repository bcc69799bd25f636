// Copies between strided memory and a buffer in logical order.
#pragma once

#include <stdint.h>
#include <string.h>

#include <algorithm>

#include "call.h"

namespace ddpm_ext::cpu {

// In bytes.
inline int64_t element_size(DType dtype) { return dtype == DType::float32 ? 4 : 2; }

// Walks through a sample in logical order and tracks the offset in one strided tensor.
class StridedWalk {
 public:
  StridedWalk(const Call& call, const TensorArg& tensor, int64_t start) : call_(call), tensor_(tensor) {
    for (int d = call.dims - 1; d >= 0; --d) {
      index_[d] = start % call.sizes[d];
      start /= call.sizes[d];
      offset_ += index_[d] * tensor.strides[d];
    }
  }

  // Calls copy(offset, stride, count) for pieces along the last dimension, n elements in total.
  template <class Copy>
  void walk(int64_t n, Copy copy) {
    const int last = call_.dims - 1;
    while (n > 0) {
      const int64_t count = std::min(n, call_.sizes[last] - index_[last]);
      copy(offset_, tensor_.strides[last], count);
      n -= count;
      advance(last, count);
      for (int d = last; d > 0 && index_[d] == call_.sizes[d]; --d) {
        offset_ -= index_[d] * tensor_.strides[d];
        index_[d] = 0;
        advance(d - 1, 1);
      }
    }
  }

 private:
  void advance(int d, int64_t n) {
    index_[d] += n;
    offset_ += n * tensor_.strides[d];
  }

  const Call& call_;
  const TensorArg& tensor_;
  int64_t index_[kMaxDims] = {};
  int64_t offset_ = 0;
};

template <class T>
void gather(StridedWalk walk, const T* from, T* to, int64_t n) {
  walk.walk(n, [&](int64_t offset, int64_t stride, int64_t count) {
    for (int64_t i = 0; i < count; ++i) *to++ = from[offset + i * stride];
  });
}

template <class T>
void scatter(StridedWalk walk, const T* from, T* to, int64_t n) {
  walk.walk(n, [&](int64_t offset, int64_t stride, int64_t count) {
    for (int64_t i = 0; i < count; ++i) to[offset + i * stride] = *from++;
  });
}

// Copies elements j to j + n of a sample into the buffer and adds zeros up to `padded` elements.
inline void load(const Call& call, const TensorArg& tensor, const char* sample, int64_t j, int64_t n, int64_t padded,
                 char* buffer) {
  const int64_t size = element_size(tensor.dtype);
  const StridedWalk walk(call, tensor, j);
  if (size == 4) {
    gather(walk, reinterpret_cast<const float*>(sample), reinterpret_cast<float*>(buffer), n);
  } else {
    gather(walk, reinterpret_cast<const uint16_t*>(sample), reinterpret_cast<uint16_t*>(buffer), n);
  }
  memset(buffer + n * size, 0, (padded - n) * size);
}

// Copies n elements of the buffer to elements j to j + n of a sample.
inline void store(const Call& call, const TensorArg& tensor, char* sample, int64_t j, int64_t n, const char* buffer) {
  const StridedWalk walk(call, tensor, j);
  if (element_size(tensor.dtype) == 4) {
    scatter(walk, reinterpret_cast<const float*>(buffer), reinterpret_cast<float*>(sample), n);
  } else {
    scatter(walk, reinterpret_cast<const uint16_t*>(buffer), reinterpret_cast<uint16_t*>(sample), n);
  }
}

}  // namespace ddpm_ext::cpu
