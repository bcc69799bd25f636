// Vectors of pieces that lie apart in memory, for transposing.
#pragma once

#if defined(__clang__) || __GNUC__ >= 12  // which have __builtin_shufflevector

namespace ddpm_ext::DDPM_ISA {
namespace {

// Of 16 bits two at most, which are 16 columns: 32 at once are up to a tenth slower.
template <class T>
constexpr int64_t kMostPieces = sizeof(Floats) == 64 && sizeof(T) == 2 ? 2 : sizeof(Floats) / 16;

// A vector of pieces, of 16 bytes if nothing else is said. No permutation crosses their borders, which would often take
// more instructions.
template <int64_t kPieces, class T, int64_t kBytes = 16>
struct Pieces {
  static constexpr int64_t kPiece = kBytes / sizeof(T), kAll = kPieces * kPiece;  // elements
  typedef T Vector __attribute__((vector_size(kBytes * kPieces)));

  // They are `apart` elements from each other in memory.
  static DDPM_HD Vector load(const T* from, int64_t apart) {
    if constexpr (kPieces == 1) {
      Vector piece;
      memcpy(&piece, from, sizeof(piece));
      return piece;
    } else {
      using Half = Pieces<kPieces / 2, T, kBytes>;
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

// Writes each piece of a vector to a place of its own.
template <int64_t kBytes = 16, class Vector, class T>
DDPM_HD void scatter(Vector v, T* to, int64_t apart) {
  for (int64_t p = 0; p < static_cast<int64_t>(sizeof(v)) / kBytes; ++p)
    memcpy(to + p * apart, reinterpret_cast<const char*>(&v) + kBytes * p, kBytes);
}

}  // namespace
}  // namespace ddpm_ext::DDPM_ISA

#endif
