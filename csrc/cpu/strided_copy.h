// Copies between strided memory and a buffer in logical order.
#pragma once

#include <stdint.h>

#include <algorithm>

#include "call.h"

namespace ddpm_ext::cpu {

// In bytes.
inline int64_t element_size(DType dtype) { return dtype == DType::float32 ? 4 : 2; }

// Calls copy(offset, stride, count) for the pieces along the last dimension of n elements of a sample, from `start` on
// in logical order. Offsets and strides are those of the tensor.
template <class Copy>
void for_each_piece(const Call& call, const TensorArg& tensor, int64_t start, int64_t n, Copy copy) {
  int64_t index[kMaxDims], offset = 0;
  for (int d = call.dims - 1; d >= 0; --d) {
    index[d] = start % call.sizes[d];
    start /= call.sizes[d];
    offset += index[d] * tensor.strides[d];
  }
  const int last = call.dims - 1;
  while (n > 0) {
    const int64_t count = std::min(n, call.sizes[last] - index[last]);
    copy(offset, tensor.strides[last], count);
    n -= count;
    index[last] += count;
    offset += count * tensor.strides[last];
    for (int d = last; d > 0 && index[d] == call.sizes[d]; --d) {
      offset += tensor.strides[d - 1] - index[d] * tensor.strides[d];
      index[d] = 0;
      ++index[d - 1];
    }
  }
}

// Calls copy(sample, buffer) with pointers to integers that have the size of the tensor's elements.
template <class Copy>
void by_size(const TensorArg& tensor, char* sample, char* buffer, Copy copy) {
  if (element_size(tensor.dtype) == 4)
    return copy(reinterpret_cast<uint32_t*>(sample), reinterpret_cast<uint32_t*>(buffer));
  copy(reinterpret_cast<uint16_t*>(sample), reinterpret_cast<uint16_t*>(buffer));
}

// Copies elements j to j + n of a sample into the buffer and adds zeros up to `padded` elements.
inline void load(const Call& call, const TensorArg& tensor, char* sample, int64_t j, int64_t n, int64_t padded,
                 char* buffer) {
  by_size(tensor, sample, buffer, [&](const auto* from, auto* to) {
    for_each_piece(call, tensor, j, n, [&](int64_t offset, int64_t stride, int64_t count) {
      for (int64_t i = 0; i < count; ++i) *to++ = from[offset + i * stride];
    });
    std::fill(to, to + (padded - n), 0);
  });
}

// Copies n elements of the buffer to elements j to j + n of a sample.
inline void store(const Call& call, const TensorArg& tensor, char* sample, int64_t j, int64_t n, char* buffer) {
  by_size(tensor, sample, buffer, [&](auto* to, const auto* from) {
    for_each_piece(call, tensor, j, n, [&](int64_t offset, int64_t stride, int64_t count) {
      for (int64_t i = 0; i < count; ++i) to[offset + i * stride] = *from++;
    });
  });
}

}  // namespace ddpm_ext::cpu
