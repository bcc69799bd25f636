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

// A vector of pieces of 16 bytes. No permutation crosses their borders, which would take more instructions.
template <int64_t kPieces, class T>
struct Pieces {
  static constexpr int64_t kPiece = 16 / sizeof(T), kAll = kPieces * kPiece;  // elements
  typedef T Vector __attribute__((vector_size(16 * kPieces)));

  // They are `apart` elements from each other in memory.
  static DDPM_HD Vector load(const T* from, int64_t apart) {
    if constexpr (kPieces == 1) {
      Vector piece;
      memcpy(&piece, from, sizeof(piece));
      return piece;
    } else {
      using Half = Pieces<kPieces / 2, T>;
      return join(Half::load(from, apart), Half::load(from + kPieces / 2 * apart, apart),
                  std::make_index_sequence<kAll>());
    }
  }
  template <class Half, size_t... i>
  static DDPM_HD Vector join(Half a, Half b, std::index_sequence<i...>) {
    return __builtin_shufflevector(a, b, i...);
  }

  // The lower or the upper halves of the pieces of a and b, an element of each in turn.
  template <bool kUpper>
  static DDPM_HD Vector interleave(Vector a, Vector b) {
    return interleave<kUpper>(a, b, std::make_index_sequence<kAll>());
  }
  template <bool kUpper, size_t... i>
  static DDPM_HD Vector interleave(Vector a, Vector b, std::index_sequence<i...>) {
    return __builtin_shufflevector(
        a, b, (i / kPiece * kPiece + (kUpper ? kPiece / 2 : 0) + i % kPiece / 2 + i % 2 * kAll)...);
  }
};

// A block of kPiece rows and kAll columns.
template <class P, class T>
DDPM_HD void transpose_block(const T* from, int64_t in, T* to, int64_t out) {
  constexpr int64_t n = P::kPiece;
  typename P::Vector v[n], next[n];
  for (int64_t i = 0; i < n; ++i) v[i] = P::load(from + i * in, n * in);
  for (int64_t interleaved = 1; interleaved < n; interleaved *= 2) {
    for (int64_t i = 0; i < n / 2; ++i) {
      next[2 * i] = P::template interleave<false>(v[i], v[i + n / 2]);
      next[2 * i + 1] = P::template interleave<true>(v[i], v[i + n / 2]);
    }
    for (int64_t i = 0; i < n; ++i) v[i] = next[i];
  }
  for (int64_t i = 0; i < n; ++i) memcpy(to + i * out, &v[i], sizeof(v[i]));
}

template <int64_t kPieces, class T>
void transpose_blocks(const T* from, int64_t in, T* to, int64_t out, int64_t rows, int64_t columns) {
  using P = Pieces<kPieces, T>;
  constexpr int64_t kLine = 64 / sizeof(T), kAhead = 4096 / sizeof(T);
  const int64_t whole_rows = rows / P::kPiece * P::kPiece, whole_columns = columns / P::kAll * P::kAll;
  // The lines of a few columns are read whole: those of more columns may not fit into a core's first cache.
  for (int64_t first = 0; first < whole_rows; first += kLine)
    for (int64_t c = 0; c < whole_columns; c += P::kAll) {
      // Whole columns follow each other in memory, also behind the matrix. A core reads elsewhere between two calls, so
      // it does not fetch them far enough ahead itself. For columns of less than a line that costs more than it gains.
      if (in == rows && in >= kLine && first == 0)
        for (int64_t i = 0; i < P::kAll * in; i += kLine) __builtin_prefetch(from + c * in + i + kAhead);
      for (int64_t r = first; r < first + kLine && r < whole_rows; r += P::kPiece)
        transpose_block<P>(from + c * in + r, in, to + r * out + c, out);
    }
  const T* const beside = from + whole_columns * in;
  if constexpr (kPieces > 1)
    transpose_blocks<kPieces / 2>(beside, in, to + whole_columns, out, whole_rows, columns - whole_columns);
  else
    transpose_squares<4>(beside, in, to + whole_columns, out, whole_rows, columns - whole_columns);
  transpose_squares<4>(from + whole_rows, in, to + whole_rows * out, out, rows - whole_rows, columns);
}

#endif

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
#if defined(__clang__) || __GNUC__ >= 12
  // Of vectors of AVX-512 the compiler's own permutations are as good, and more lines are read at once.
  const bool by_squares = sizeof(Floats) == 64 && sizeof(T) == 4 && rows % 16 == 0 && columns % 16 == 0;
  if (!by_squares) return transpose_blocks<sizeof(Floats) == 16 ? 1 : 2>(from, in, to, out, rows, columns);
#endif
  transpose_squares<16>(from, in, to, out, rows, columns);
}

}  // namespace
}  // namespace ddpm_ext::DDPM_ISA
