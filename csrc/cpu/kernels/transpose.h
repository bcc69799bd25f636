// Transposes matrices, such as an image whose pixels have their channels together into channels that have their pixels
// together. Loops over numbers that the compiler knows become permutations of vectors.
#pragma once

namespace ddpm_ext::DDPM_ISA {
namespace {

template <int kRows, class T>
void split_channels(const T* __restrict from, T* __restrict to, int64_t out, int64_t columns) {
  for (int64_t c = 0; c < columns; ++c)
    for (int r = 0; r < kRows; ++r) to[r * out + c] = from[c * kRows + r];
}

template <int kColumns, class T>
void join_channels(const T* __restrict from, int64_t in, T* __restrict to, int64_t rows) {
  for (int64_t r = 0; r < rows; ++r)
    for (int c = 0; c < kColumns; ++c) to[r * kColumns + c] = from[c * in + r];
}

template <int64_t kBlock, class T>
DDPM_HD void transpose_block(const T* __restrict from, int64_t in, T* __restrict to, int64_t out) {
  T block[kBlock][kBlock];
  for (int64_t r = 0; r < kBlock; ++r)
    for (int64_t c = 0; c < kBlock; ++c) block[r][c] = from[c * in + r];
  for (int64_t r = 0; r < kBlock; ++r)
    for (int64_t c = 0; c < kBlock; ++c) to[r * out + c] = block[r][c];
}

// By square blocks, and what is left over by smaller ones.
template <int64_t kBlock, class T>
void transpose_blocks(const T* from, int64_t in, T* to, int64_t out, int64_t rows, int64_t columns) {
  const int64_t whole_rows = rows / kBlock * kBlock, whole_columns = columns / kBlock * kBlock;
  for (int64_t r = 0; r < whole_rows; r += kBlock)
    for (int64_t c = 0; c < whole_columns; c += kBlock)
      transpose_block<kBlock>(from + c * in + r, in, to + r * out + c, out);
  if constexpr (kBlock > 1) {
    constexpr int64_t kSmaller = kBlock > 4 ? kBlock / 2 : 1;
    transpose_blocks<kSmaller>(from + whole_rows, in, to + whole_rows * out, out, rows - whole_rows, columns);
    transpose_blocks<kSmaller>(from + whole_columns * in, in, to + whole_columns, out, whole_rows,
                               columns - whole_columns);
  }
}

// to[r * out + c] = from[c * in + r]
template <class T>
void transpose_matrix(const void* source, int64_t in, void* target, int64_t out, int64_t rows, int64_t columns) {
  const T* const from = static_cast<const T*>(source);
  T* const to = static_cast<T*>(target);
  if (rows == 3 && in == 3) return split_channels<3>(from, to, out, columns);
  if (rows == 4 && in == 4) return split_channels<4>(from, to, out, columns);
  if (columns == 3 && out == 3) return join_channels<3>(from, in, to, rows);
  if (columns == 4 && out == 4) return join_channels<4>(from, in, to, rows);
  if (columns == 8 && out == 8) return join_channels<8>(from, in, to, rows);
  constexpr int64_t kVector = sizeof(Floats) / sizeof(T), kBlock = kVector < 8 ? 8 : kVector > 16 ? 16 : kVector;
  transpose_blocks<kBlock>(from, in, to, out, rows, columns);
}

}  // namespace
}  // namespace ddpm_ext::DDPM_ISA
