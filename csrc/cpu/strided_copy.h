// Copies between strided memory and a buffer, whose elements are in the order of the call's sizes.
#pragma once

#include <stdint.h>

#include <algorithm>
#include <cstring>

#include "call.h"
#include "cpu/operators.h"

namespace ddpm_ext::cpu {

// In bytes.
inline int64_t element_size(DType dtype) { return dtype == DType::float32 ? 4 : 2; }

// The distances in memory, in elements, between neighbouring rows of a matrix and between its columns.
struct Apart {
  int64_t rows, columns;
};

// Copies a matrix of elements of type T.
template <class T>
void copy_matrix(const T* from, Apart in, T* to, Apart out, int64_t rows, int64_t columns) {
  const auto transpose = kernels().transpose[sizeof(T) == 2];
  if (in.rows == 1 && out.columns == 1) return transpose(from, in.columns, to, out.rows, rows, columns);
  if (in.columns == 1 && out.rows == 1) return transpose(from, in.rows, to, out.columns, columns, rows);
  if (in.columns == 1 && out.columns == 1 && in.rows == columns && out.rows == columns) {  // one piece of memory
    std::copy(from, from + rows * columns, to);
    return;
  }
  // Of rows that overlap, as those of an expanded tensor, memory may end before what is packed at once.
  if (in.columns == 1 && out.columns == 1 && out.rows == columns && in.rows >= columns &&
      kernels().pack[sizeof(T) == 2](from, in.rows, to, rows, columns))
    return;
  if (rows > columns) {  // the inner loop takes the longer dimension
    std::swap(rows, columns);
    std::swap(in.rows, in.columns);
    std::swap(out.rows, out.columns);
  }
  for (int64_t r = 0; r < rows; ++r, from += in.rows, to += out.rows) {
    if (in.columns == 1 && out.columns == 1)
      std::copy(from, from + columns, to);
    else
      for (int64_t c = 0; c < columns; ++c) to[c * out.columns] = from[c * in.columns];
  }
}

// Calls copy(offset, rows, count) for pieces of n elements of a sample, from `start` on: `rows` rows that have `count`
// elements each along the last dimension. The offset is that in the tensor.
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
    const bool whole = last > 0 && count == call.sizes[last];
    const int64_t rows = whole ? std::min(n / count, call.sizes[last - 1] - index[last - 1]) : 1;
    copy(offset, rows, count);
    n -= rows * count;
    if (whole) {
      index[last - 1] += rows - 1;
      offset += (rows - 1) * tensor.strides[last - 1];
    }
    index[last] += count;
    offset += count * tensor.strides[last];
    for (int d = last; d > 0 && index[d] == call.sizes[d]; --d) {
      offset += tensor.strides[d - 1] - index[d] * tensor.strides[d];
      index[d] = 0;
      ++index[d - 1];
    }
  }
}

// How far apart the rows and columns of a piece are in the tensor.
inline Apart apart_in(const Call& call, const TensorArg& tensor) {
  return {call.dims > 1 ? tensor.strides[call.dims - 2] : 0, tensor.strides[call.dims - 1]};
}

// Calls copy(sample, buffer) with pointers to integers that have the size of the tensor's elements.
template <class Copy>
void by_size(const TensorArg& tensor, char* sample, char* buffer, Copy copy) {
  if (element_size(tensor.dtype) == 4)
    return copy(reinterpret_cast<uint32_t*>(sample), reinterpret_cast<uint32_t*>(buffer));
  copy(reinterpret_cast<uint16_t*>(sample), reinterpret_cast<uint16_t*>(buffer));
}

// Elements j to j + n of each of a sample's `rows` rows. In a buffer a row has room for `padded` elements. If there is
// one row, it is the sample; else a row is an index of the first of two dimensions.
struct Stretch {
  int64_t rows, j, n, padded;
};

// Copies a stretch of a sample into the buffer and adds zeros up to `padded` elements.
inline void load(const Call& call, const TensorArg& tensor, char* sample, const Stretch& stretch, char* buffer) {
  const auto [rows, j, n, padded] = stretch;
  const Apart apart = apart_in(call, tensor);
  by_size(tensor, sample, buffer, [&](const auto* from, auto* to) {
    if (rows > 1)
      copy_matrix(from + j * apart.columns, apart, to, {padded, 1}, rows, n);
    else
      for_each_piece(call, tensor, j, n, [&, at = to](int64_t offset, int64_t height, int64_t count) mutable {
        copy_matrix(from + offset, apart, at, {count, 1}, height, count);
        at += height * count;
      });
    for (int64_t r = 0; r < rows; ++r) std::fill(to + r * padded + n, to + (r + 1) * padded, 0);
  });
}

// Copies a stretch of a sample from the buffer.
inline void store(const Call& call, const TensorArg& tensor, char* sample, const Stretch& stretch, char* buffer) {
  const auto [rows, j, n, padded] = stretch;
  const Apart apart = apart_in(call, tensor);
  by_size(tensor, sample, buffer, [&](auto* to, const auto* from) {
    if (rows > 1)
      copy_matrix(from, {padded, 1}, to + j * apart.columns, apart, rows, n);
    else
      for_each_piece(call, tensor, j, n, [&, at = from](int64_t offset, int64_t height, int64_t count) mutable {
        copy_matrix(at, {count, 1}, to + offset, apart, height, count);
        at += height * count;
      });
  });
}

}  // namespace ddpm_ext::cpu
