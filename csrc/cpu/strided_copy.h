// Copies between strided memory and a buffer, whose elements are in the order of the call's sizes.
#pragma once

#include <stdint.h>

#include <algorithm>
#include <cstring>
#include <type_traits>
#include <utility>

#include "call.h"

namespace ddpm_ext::cpu {

// In bytes.
inline int64_t element_size(DType dtype) { return dtype == DType::float32 ? 4 : 2; }

// The distances in memory, in elements, between neighbouring rows of a matrix and between its columns.
struct Apart {
  int64_t rows, columns;
};

// Copies rows that have their elements side by side. Of short ones, some bytes more are copied at a time, which the
// next row replaces: a call of memcpy for each would take longer.
template <class T>
void copy_rows(const T* from, int64_t in, T* to, int64_t out, int64_t rows, int64_t columns) {
  if (in == columns && out == columns) columns *= rows, rows = 1;
  const auto copy_most = [&](auto bytes) {
    constexpr int64_t kBytes = decltype(bytes)::value;
    for (; rows > 1; --rows, from += in, to += out) memcpy(to, from, kBytes);
  };
  // Of rows that overlap, as those of an expanded tensor, memory may end before what is copied at a time.
  const int64_t size = columns * sizeof(T);
  if (out == columns && in >= columns && size > 4 && size <= 32) {
    if (size <= 8)
      copy_most(std::integral_constant<int64_t, 8>());
    else if (size <= 16)
      copy_most(std::integral_constant<int64_t, 16>());
    else
      copy_most(std::integral_constant<int64_t, 32>());
  }
  for (; rows > 0; --rows, from += in, to += out) std::copy(from, from + columns, to);
}

// The lower or the upper halves of two vectors, an element of each in turn.
template <bool kUpper, class Vector, size_t... i>
DDPM_HD Vector interleave(Vector a, Vector b, std::index_sequence<i...>) {
  constexpr size_t n = sizeof...(i);
#ifdef __clang__
  return __builtin_shufflevector(a, b, (i % 2 * n + i / 2 + kUpper * n / 2)...);
#else
  return __builtin_shuffle(a, b, Vector{(i % 2 * n + i / 2 + kUpper * n / 2)...});
#endif
}

// to[r * out + c] = from[c * in + r] for a square of n rows and columns. Where there are fewer, the first ones are
// written or read, all of n elements, so that what lies behind the matrix is read or written, too.
template <int64_t n, class T>
DDPM_HD void transpose_square(const T* from, int64_t in, T* to, int64_t out, int64_t rows, int64_t columns) {
  constexpr auto lanes = std::make_index_sequence<n>();
  typedef T Vector __attribute__((vector_size(n * sizeof(T))));
  Vector v[n] = {}, next[n];
  for (int64_t c = 0; c < columns; ++c) memcpy(&v[c], from + c * in, sizeof(Vector));
  for (int64_t done = 1; done < n; done *= 2) {
    for (int64_t i = 0; i < n / 2; ++i) {
      next[2 * i] = interleave<false>(v[i], v[i + n / 2], lanes);
      next[2 * i + 1] = interleave<true>(v[i], v[i + n / 2], lanes);
    }
    for (int64_t i = 0; i < n; ++i) v[i] = next[i];
  }
  for (int64_t r = 0; r < rows; ++r) memcpy(to + r * out, &v[r], sizeof(Vector));
}

// to[r * out + c] = from[c * in + r], by squares of n rows and columns.
template <int64_t n, class T>
void transpose_by(const T* from, int64_t in, T* to, int64_t out, int64_t rows, int64_t columns) {
  constexpr int64_t kBlock = 16;  // so many rows and columns are done at a time: they share lines
  if (rows >= n && columns >= n) {
    for (int64_t first_row = 0; first_row < rows; first_row += kBlock)
      for (int64_t first_column = 0; first_column < columns; first_column += kBlock)
        for (int64_t i = first_row; i < std::min(rows, first_row + kBlock); i += n)
          for (int64_t k = first_column; k < std::min(columns, first_column + kBlock); k += n) {
            const int64_t r = std::min(i, rows - n), c = std::min(k, columns - n);  // the last ones overlap others
            transpose_square<n>(from + c * in + r, in, to + r * out + c, out, n, n);
          }
    return;
  }
  // Of pixels with fewer channels, squares go on into the next pixels: what they read of those is not used, and what
  // they write is replaced by the next square. So they end before memory does.
  int64_t done_rows = 0, done_columns = 0;
  if (rows < n)
    for (; (done_columns + n - 1) * in + n <= (columns - 1) * in + rows; done_columns += n)
      transpose_square<n>(from + done_columns * in, in, to + done_columns, out, rows, n);
  else if (out == columns)
    for (; (done_rows + n - 1) * out + n <= (rows - 1) * out + columns; done_rows += n)
      transpose_square<n>(from + done_rows, in, to + done_rows * out, out, n, columns);
  for (int64_t r = done_rows; r < rows; ++r)
    for (int64_t c = done_columns; c < columns; ++c) to[r * out + c] = from[c * in + r];
}

// By squares of 16 bytes a row, which every instruction set has vectors for, or of four elements where those are too
// many.
template <class T>
void transpose(const T* from, int64_t in, T* to, int64_t out, int64_t rows, int64_t columns) {
  constexpr int64_t kSide = 16 / sizeof(T);
  if (rows > 4 && columns >= kSide) return transpose_by<kSide>(from, in, to, out, rows, columns);
  transpose_by<4>(from, in, to, out, rows, columns);
}

// Copies a matrix of elements of type T.
template <class T>
void copy_matrix(const T* from, Apart in, T* to, Apart out, int64_t rows, int64_t columns) {
  if (in.rows == 1 && out.columns == 1) return transpose(from, in.columns, to, out.rows, rows, columns);
  if (in.columns == 1 && out.rows == 1) return transpose(from, in.rows, to, out.columns, columns, rows);
  if (in.columns == 1 && out.columns == 1) return copy_rows(from, in.rows, to, out.rows, rows, columns);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < columns; ++c) to[r * out.rows + c * out.columns] = from[r * in.rows + c * in.columns];
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

// Elements j to j + n of each of a sample's `rows` rows. In a buffer a row has room for `padded` elements. If there is
// one row, it is the sample; else a row is an index of the first of two dimensions.
struct Stretch {
  int64_t rows, j, n, padded;
};

template <bool kStore, class T>
void copy_elements(const Call& call, const TensorArg& tensor, T* sample, const Stretch& stretch, T* buffer) {
  const auto [rows, j, n, padded] = stretch;
  const int last = call.dims - 1;
  const Apart apart = {last > 0 ? tensor.strides[last - 1] : 0, tensor.strides[last]};
  const auto copy = [&](T* in_sample, T* in_buffer, int64_t height, int64_t width, int64_t row) {
    if constexpr (kStore)
      copy_matrix(in_buffer, {row, 1}, in_sample, apart, height, width);
    else
      copy_matrix(in_sample, apart, in_buffer, {row, 1}, height, width);
  };
  if (rows > 1)
    copy(sample + j * apart.columns, buffer, rows, n, padded);
  else
    for_each_piece(call, tensor, j, n, [&, at = buffer](int64_t offset, int64_t height, int64_t width) mutable {
      copy(sample + offset, at, height, width, width);
      at += height * width;
    });
  if constexpr (!kStore)
    for (int64_t r = 0; r < rows; ++r) std::fill(buffer + r * padded + n, buffer + (r + 1) * padded, 0);
}

// Copies a stretch of a sample from the buffer, or into it, with zeros up to `padded` elements.
template <bool kStore>
void copy_stretch(const Call& call, const TensorArg& tensor, char* sample, const Stretch& stretch, char* buffer) {
  if (element_size(tensor.dtype) == 4)
    copy_elements<kStore>(call, tensor, reinterpret_cast<uint32_t*>(sample), stretch,
                          reinterpret_cast<uint32_t*>(buffer));
  else
    copy_elements<kStore>(call, tensor, reinterpret_cast<uint16_t*>(sample), stretch,
                          reinterpret_cast<uint16_t*>(buffer));
}

}  // namespace ddpm_ext::cpu
