// Transposes matrices, such as an image whose pixels have their channels together into channels that have their pixels
// together. Loops over numbers that the compiler knows become permutations of vectors.
#pragma once

#include "cpu/kernels/few_channels.h"
#include "cpu/kernels/halves.h"
#include "cpu/kernels/pieces.h"

namespace ddpm_ext::DDPM_ISA {
namespace {

// By squares, and what is left over by smaller ones.
template <int64_t kSide, class T>
void transpose_squares(const T* __restrict from, int64_t in, T* __restrict to, int64_t out, int64_t rows,
                       int64_t columns) {
  const int64_t whole_rows = rows / kSide * kSide, whole_columns = columns / kSide * kSide;
  for (int64_t r = 0; r < whole_rows; r += kSide)
    for (int64_t c = 0; c < whole_columns; c += kSide) {
      T square[kSide][kSide];
      for (int64_t i = 0; i < kSide; ++i)
        for (int64_t k = 0; k < kSide; ++k) square[i][k] = from[(c + k) * in + r + i];
      for (int64_t i = 0; i < kSide; ++i)
        for (int64_t k = 0; k < kSide; ++k) to[(r + i) * out + c + k] = square[i][k];
    }
  if constexpr (kSide > 1) {
    constexpr int64_t kLess = kSide > 4 ? kSide / 2 : 1;
    transpose_squares<kLess>(from + whole_rows, in, to + whole_rows * out, out, rows - whole_rows, columns);
    transpose_squares<kLess>(from + whole_columns * in, in, to + whole_columns, out, whole_rows,
                             columns - whole_columns);
  }
}

#if defined(__clang__) || __GNUC__ >= 12  // which have __builtin_shufflevector

// Each v[i] has elements of line i. Afterwards the vectors have an element of each line in turn.
template <class P, int64_t kLines>
DDPM_HD void interleave_lines(typename P::Vector (&v)[kLines]) {
  typename P::Vector next[kLines];
  for (int64_t interleaved = 1; interleaved < kLines; interleaved *= 2) {
    for (int64_t i = 0; i < kLines / 2; ++i) {
      next[2 * i] = P::template interleave<false>(v[i], v[i + kLines / 2]);
      next[2 * i + 1] = P::template interleave<true>(v[i], v[i + kLines / 2]);
    }
    for (int64_t i = 0; i < kLines; ++i) v[i] = next[i];
  }
}

// A block of kPiece rows and kAll columns, of which the last kRows rows are written.
template <class P, int64_t kRows, class T>
DDPM_HD void gather_block(const T* from, int64_t in, T* to, int64_t out) {
  constexpr int64_t n = P::kPiece;
  typename P::Vector v[n];
  for (int64_t i = 0; i < n; ++i) v[i] = P::load(from + i * in, n * in);
  interleave_lines<P, n>(v);
  for (int64_t i = n - kRows; i < n; ++i) memcpy(to + i * out, &v[i], sizeof(v[i]));
}

// A block of kAll rows and kPiece columns.
template <class P, class T>
DDPM_HD void scatter_block(const T* from, int64_t in, T* to, int64_t out) {
  constexpr int64_t n = P::kPiece;
  typename P::Vector v[n];
  for (int64_t i = 0; i < n; ++i) memcpy(&v[i], from + i * in, sizeof(v[i]));
  interleave_lines<P, n>(v);
  for (int64_t i = 0; i < n; ++i) scatter(v[i], to + i * out, n * out);
}

// A block of kAll rows and 12 columns of 16 bits. As its rows follow each other in memory, two of them are three
// pieces.
template <class P, class T>
DDPM_HD void scatter_twelve(const T* from, int64_t in, T* to) {
  using Halves = Pieces<sizeof(typename P::Vector) / 16, uint64_t>;
  using Vector = typename Halves::Vector;
  typename P::Vector first[8], last[4];
  for (int64_t i = 0; i < 8; ++i) memcpy(&first[i], from + i * in, sizeof(first[i]));
  for (int64_t i = 0; i < 4; ++i) memcpy(&last[i], from + (8 + i) * in, sizeof(last[i]));
  interleave_lines<P, 8>(first);
  interleave_lines<P, 4>(last);
  for (int64_t i = 0; i < 4; ++i) {
    const Vector even = Vector(first[2 * i]), odd = Vector(first[2 * i + 1]), both = Vector(last[i]);
    T* const rows = to + 2 * i * 12;
    scatter(even, rows, 8 * 12);
    scatter(Halves::template interleave<false>(both, odd), rows + 8, 8 * 12);
    scatter(Halves::template interleave<true>(odd, both), rows + 16, 8 * 12);
  }
}

// The columns of whole blocks, whose number is returned. There are at least kPiece rows.
template <class P, class T>
DDPM_HD int64_t gather_blocks(const T* from, int64_t in, T* to, int64_t out, int64_t rows, int64_t columns) {
  constexpr int64_t n = P::kPiece, kLine = 64 / sizeof(T), kAhead = 4096 / sizeof(T);
  const int64_t whole_rows = rows / n * n, whole_columns = columns / P::kAll * P::kAll, last = rows - n;
  // The lines of a few columns are read whole: those of more columns may not fit into a core's first cache.
  for (int64_t first = 0; first < rows; first += kLine)
    for (int64_t c = 0; c < whole_columns; c += P::kAll) {
      // Whole columns follow each other in memory, also behind the matrix. A core reads elsewhere between two calls, so
      // it does not fetch them far enough ahead itself. For columns of less than a line that costs more than it gains.
      if (in == rows && in >= kLine && first == 0)
        for (int64_t i = 0; i < P::kAll * in; i += kLine) __builtin_prefetch(from + c * in + i + kAhead);
      for (int64_t r = first; r < first + kLine && r < whole_rows; r += n)
        gather_block<P, n>(from + c * in + r, in, to + r * out + c, out);
      if (first + kLine < rows || rows == whole_rows) continue;
      // Some of the rows of the last block may be written again.
      if (rows - whole_rows <= n / 2)
        gather_block<P, n / 2>(from + c * in + last, in, to + last * out + c, out);
      else
        gather_block<P, n>(from + c * in + last, in, to + last * out + c, out);
    }
  return whole_columns;
}

// Columns from `begin` on. There are at least kAll rows and kPiece columns. Some columns may be written again.
template <class P, class T>
DDPM_HD void scatter_blocks(const T* from, int64_t in, T* to, int64_t out, int64_t rows, int64_t columns,
                            int64_t begin) {
  constexpr int64_t n = P::kPiece, kLine = 64 / sizeof(T);
  const bool twelve = sizeof(T) == 2 && begin == 0 && columns == 12 && out == 12;
  for (int64_t first = 0; first < rows; first += kLine)
    for (int64_t column = begin; column < columns; column += twelve ? columns : n)
      for (int64_t row = first; row < first + kLine && row < rows; row += P::kAll) {
        const int64_t c = column < columns - n || twelve ? column : columns - n;
        const int64_t r = row < rows - P::kAll ? row : rows - P::kAll;
        if constexpr (sizeof(T) == 2) {
          if (twelve) {
            scatter_twelve<P>(from + r, in, to + r * out);
            continue;
          }
        }
        scatter_block<P>(from + c * in + r, in, to + r * out + c, out);
      }
}

template <int64_t kPieces, class T>
DDPM_HD void transpose_blocks(const T* from, int64_t in, T* to, int64_t out, int64_t rows, int64_t columns) {
  using P = Pieces<kPieces, T>;
  int64_t done = 0;
  if (rows >= P::kPiece && columns >= P::kAll) done = gather_blocks<P>(from, in, to, out, rows, columns);
  if (done == columns) return;
  // Of 32 bits, whole pieces of columns are faster by blocks of shorter vectors, which are written at once.
  if (rows >= P::kAll && columns >= P::kPiece && (sizeof(T) == 2 || columns - done < P::kPiece))
    return scatter_blocks<P>(from, in, to, out, rows, columns, done);
  if constexpr (kPieces > 1)
    transpose_blocks<kPieces / 2>(from + done * in, in, to + done, out, rows, columns - done);
  else
    transpose_squares<4>(from + done * in, in, to + done, out, rows, columns - done);
}

// Transposes if one of the two sides has pixels of kChannels channels, and returns whether. As the compiler knows their
// number, it knows how far apart most addresses are: that saves a third of the time.
template <int64_t kChannels, class T>
bool transpose_channels(const T* from, int64_t in, T* to, int64_t out, int64_t rows, int64_t columns) {
  using P = Pieces<kMostPieces<T>, T>;
  if (rows == kChannels && in == kChannels) {
    const int64_t done = gather_blocks<P>(from, kChannels, to, out, kChannels, columns);
    transpose_blocks<kMostPieces<T>>(from + done * in, in, to + done, out, rows, columns - done);
    return true;
  }
  if (columns != kChannels || out != kChannels) return false;
  transpose_blocks<kMostPieces<T>>(from, in, to, kChannels, rows, kChannels);
  return true;
}

#endif

template <class T>
void transpose_lines(const T* from, int64_t in, T* to, int64_t out, int64_t rows, int64_t columns) {
  if (transpose_few<2>(from, in, to, out, rows, columns) || transpose_few<3>(from, in, to, out, rows, columns) ||
      transpose_few<4>(from, in, to, out, rows, columns) || transpose_few<5>(from, in, to, out, rows, columns) ||
      transpose_few<6>(from, in, to, out, rows, columns) || transpose_few<7>(from, in, to, out, rows, columns))
    return;
#if defined(__clang__) || __GNUC__ >= 12
  const bool known = transpose_channels<8>(from, in, to, out, rows, columns) ||
                     transpose_channels<12>(from, in, to, out, rows, columns) ||
                     transpose_channels<16>(from, in, to, out, rows, columns) ||
                     transpose_channels<32>(from, in, to, out, rows, columns);
  if (!known) transpose_blocks<kMostPieces<T>>(from, in, to, out, rows, columns);
#else
  if (columns == 8 && out == 8) return join_channels<8>(from, in, to, rows);
  transpose_squares<16>(from, in, to, out, rows, columns);
#endif
}

// to[r * out + c] = from[c * in + r]
template <class T>
void transpose_matrix(const void* source, int64_t in, void* target, int64_t out, int64_t rows, int64_t columns) {
  const T* from = static_cast<const T*>(source);
  T* to = static_cast<T*>(target);
  const int64_t done = split_halves(from, in, to, out, rows, columns);
  from += in * done, to += done, columns -= done;
  // A few of more channels: what lies between them goes first. 3 of 6 are taken from whole pixels.
  constexpr int64_t kPiece = 16 / sizeof(T), kColumns = 512;  // a vector of SSE2
  if (rows >= kPiece || in <= rows || rows * sizeof(T) <= 4 || (rows == 3 && in == 6))
    return transpose_lines(from, in, to, out, rows, columns);
  T pixels[kPiece * kColumns];
  for (int64_t c = 0; c < columns; c += kColumns) {
    const int64_t count = columns - c < kColumns ? columns - c : kColumns;
    pack<T>(from + c * in, in, pixels, count, rows);
    transpose_lines(pixels, rows, to + c, out, rows, count);
  }
}

}  // namespace
}  // namespace ddpm_ext::DDPM_ISA
