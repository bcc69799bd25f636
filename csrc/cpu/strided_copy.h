// Copies between strided memory and a buffer. The elements of the buffer are contiguous, in the order of the call's
// sizes.
#pragma once

#include <stdint.h>

#include <algorithm>
#include <cstring>
#include <type_traits>
#include <utility>

#include "call.h"

namespace ddpm_ext::cpu {

// Returns the size of an element in bytes.
inline int64_t element_size(DType dtype) { return dtype == DType::float32 ? 4 : 2; }

// The strides of a matrix, in elements: between neighbouring rows, and between neighbouring columns.
struct Strides {
  int64_t rows, columns;
};

// Copies rows whose elements are contiguous. `in` and `out` are the distances between rows, in elements. A short row is
// copied with a fixed number of bytes, at least the row's, and the next row overwrites the excess. This takes less time
// than calls of memcpy with the size of a row.
template <class T>
void copy_rows(const T* from, int64_t in, T* to, int64_t out, int64_t rows, int64_t columns) {
  if (in == columns && out == columns) columns *= rows, rows = 1;
  const auto copy_fixed = [&](auto bytes) {
    constexpr int64_t kBytes = decltype(bytes)::value;
    for (; rows > 1; --rows, from += in, to += out) memcpy(to, from, kBytes);
  };
  // If rows overlap in `from`, as in an expanded tensor (in < columns), reading the fixed number of bytes might go
  // beyond the end of the memory.
  const int64_t size = columns * sizeof(T);
  if (out == columns && in >= columns && size > 4 && size <= 32) {
    if (size <= 8)
      copy_fixed(std::integral_constant<int64_t, 8>());
    else if (size <= 16)
      copy_fixed(std::integral_constant<int64_t, 16>());
    else
      copy_fixed(std::integral_constant<int64_t, 32>());
  }
  for (; rows > 0; --rows, from += in, to += out) std::copy(from, from + columns, to);
}

// Returns the interleaved lower halves of two vectors, or upper halves with kUpper: an element of a, an element of b,
// and so on.
template <bool kUpper, class Vector, size_t... i>
DDPM_HD Vector interleave(Vector a, Vector b, std::index_sequence<i...>) {
  constexpr size_t n = sizeof...(i);
#ifdef __clang__
  return __builtin_shufflevector(a, b, (i % 2 * n + i / 2 + kUpper * n / 2)...);
#else
  return __builtin_shuffle(a, b, Vector{(i % 2 * n + i / 2 + kUpper * n / 2)...});
#endif
}

// Transposes a square of n rows and n columns: to[r * out + c] = from[c * in + r]. Only the first `rows` rows are
// written, and only the first `columns` columns are read. But each of these rows and columns has n elements. So if
// `rows` or `columns` is less than n, this reads and writes beyond the matrix.
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

// Transposes a matrix, to[r * out + c] = from[c * in + r], by squares of n rows and n columns.
template <int64_t n, class T>
void transpose_by(const T* from, int64_t in, T* to, int64_t out, int64_t rows, int64_t columns) {
  constexpr int64_t kBlock = 16;  // the squares of 16 rows and 16 columns come together, since they share cache lines
  if (rows >= n && columns >= n) {
    for (int64_t first_row = 0; first_row < rows; first_row += kBlock)
      for (int64_t first_column = 0; first_column < columns; first_column += kBlock)
        for (int64_t i = first_row; i < std::min(rows, first_row + kBlock); i += n)
          for (int64_t k = first_column; k < std::min(columns, first_column + kBlock); k += n) {
            const int64_t r = std::min(i, rows - n), c = std::min(k, columns - n);  // the last squares overlap others
            transpose_square<n>(from + c * in + r, in, to + r * out + c, out, n, n);
          }
    return;
  }
  // If the matrix has fewer than n rows or columns, such as channels, a square extends into the next pixels. The
  // elements that it reads there are not used, and the next square overwrites the elements that it writes there. The
  // loops at the end copy what squares cannot copy without extending beyond the memory of the matrix.
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

// Transposes a matrix by squares whose rows have 16 bytes, since every instruction set has vectors of this size. A
// smaller matrix is transposed by squares of four rows.
template <class T>
void transpose(const T* from, int64_t in, T* to, int64_t out, int64_t rows, int64_t columns) {
  constexpr int64_t kSide = 16 / sizeof(T);
  if (rows > 4 && columns >= kSide) return transpose_by<kSide>(from, in, to, out, rows, columns);
  transpose_by<4>(from, in, to, out, rows, columns);
}

// Copies a matrix of any strides.
template <class T>
void copy_matrix(const T* from, Strides in, T* to, Strides out, int64_t rows, int64_t columns) {
  if (in.rows == 1 && out.columns == 1) return transpose(from, in.columns, to, out.rows, rows, columns);
  if (in.columns == 1 && out.rows == 1) return transpose(from, in.rows, to, out.columns, columns, rows);
  if (in.columns == 1 && out.columns == 1) return copy_rows(from, in.rows, to, out.rows, rows, columns);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < columns; ++c) to[r * out.rows + c * out.columns] = from[r * in.rows + c * in.columns];
}

// Splits n elements of a sample, from element `start` on, into matrices: calls copy(offset, rows, count) for each. A
// matrix has `rows` rows of `count` elements along the last dimension. `offset` is that of its first element, from the
// start of the sample.
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

// Elements j to j + n - 1 of each row of a sample that is divided into `rows` rows. If `rows` is 1, the row is the
// whole sample. Otherwise the sample has two dimensions, and `rows` is the size of the first one. In a buffer a row
// takes up `padded` elements.
struct Stretch {
  int64_t rows, j, n, padded;
};

// copy_stretch for elements of the type T.
template <bool kStore, class T>
void copy_elements(const Call& call, const TensorArg& tensor, T* sample, const Stretch& stretch, T* buffer) {
  const auto [rows, j, n, padded] = stretch;
  const int last = call.dims - 1;
  const Strides strides = {last > 0 ? tensor.strides[last - 1] : 0, tensor.strides[last]};
  const auto copy = [&](T* in_sample, T* in_buffer, int64_t height, int64_t width, int64_t row) {
    if constexpr (kStore)
      copy_matrix(in_buffer, {row, 1}, in_sample, strides, height, width);
    else
      copy_matrix(in_sample, strides, in_buffer, {row, 1}, height, width);
  };
  if (rows > 1)
    copy(sample + j * strides.columns, buffer, rows, n, padded);
  else
    for_each_piece(call, tensor, j, n, [&, at = buffer](int64_t offset, int64_t height, int64_t width) mutable {
      copy(sample + offset, at, height, width, width);
      at += height * width;
    });
  if constexpr (!kStore)
    for (int64_t r = 0; r < rows; ++r) std::fill(buffer + r * padded + n, buffer + (r + 1) * padded, 0);
}

// With kStore, copies a buffer to a stretch of a sample. Otherwise copies the stretch to the buffer, and fills the rest
// of each row with zeros, up to `padded` elements.
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
