// Transposes pixels of few channels: brings the channels of each pixel together, or the pixels of each channel.
#pragma once

#include "cpu/kernels/pieces.h"

namespace ddpm_ext::DDPM_ISA {
namespace {

template <int64_t kChannels, class T>
void split_channels(const T* __restrict from, T* __restrict to, int64_t out, int64_t pixels) {
  for (int64_t k = 0; k < pixels; ++k)
    for (int64_t c = 0; c < kChannels; ++c) to[c * out + k] = from[k * kChannels + c];
}

template <int64_t kChannels, class T>
void join_channels(const T* __restrict from, int64_t in, T* __restrict to, int64_t pixels) {
  for (int64_t k = 0; k < pixels; ++k)
    for (int64_t c = 0; c < kChannels; ++c) to[k * kChannels + c] = from[c * in + k];
}

template <class T, int64_t kChannels>
struct FewChannels;

// Compilers make few instructions of the loops over 2 and 4 channels. SSE2 has none that permutes bytes.
#if (defined(__clang__) || __GNUC__ >= 12) && !defined(DDPM_WITHOUT_FMA)
template <int64_t kChannels>
constexpr bool kByVectors = kChannels != 2 && kChannels != 4;

// Pixels of an odd number of channels, in as many vectors of pieces: their first pieces, one behind the other, are
// whole pixels, and so are their second ones. As the number and kPiece have no common divisor, the elements of a
// channel have different places within their pieces. If those of each place move on by as many vectors as the place
// demands, the channel is in one vector, and a permutation sorts it.
template <class P, int64_t kChannels>
struct OddChannels {
  static constexpr int64_t n = P::kPiece;
  using Vector = typename P::Vector;
  using Vectors = Vector[kChannels];
  using Places = std::make_index_sequence<P::kAll>;
  using Channels = std::make_index_sequence<kChannels>;

  // The vector that has a channel at place 0, and how many vectors further another place has it.
  static constexpr int64_t first(int64_t channel) {
    int64_t v = 0;
    while (v * n % kChannels != channel) ++v;
    return v;
  }
  static constexpr int64_t further(int64_t place) { return first((kChannels - place % kChannels) % kChannels); }
  // Which of a piece's pixels that is.
  static constexpr int64_t pixel(int64_t channel, int64_t place) {
    return ((first(channel) + further(place)) % kChannels * n + place) / kChannels;
  }

  // Moves the elements of a place back to the vectors that have their channels at place 0, or from there to their own:
  // by 1, 2 and 4 vectors, if the number that further() says has that bit.
  template <bool kBack, int64_t kBy = 1, size_t... i>
  static DDPM_HD void move(Vectors& v, std::index_sequence<i...> places) {
    Vectors next;
    for (int64_t c = 0; c < kChannels; ++c)
      next[c] = __builtin_shufflevector(v[c], v[(c + (kBack ? kBy : kChannels - kBy)) % kChannels],
                                        (i + (further(i % n) & kBy ? P::kAll : 0))...);
    for (int64_t c = 0; c < kChannels; ++c) v[c] = next[c];
    if constexpr (2 * kBy < kChannels) move<kBack, 2 * kBy>(v, places);
  }
  template <int64_t c, size_t... i>
  static DDPM_HD Vector sort(Vector v, std::index_sequence<i...>) {
    return __builtin_shufflevector(v, v, (i / n * n + (i % n * kChannels + c) % n)...);
  }
  template <int64_t c, size_t... i>
  static DDPM_HD Vector spread(Vector v, std::index_sequence<i...>) {
    return __builtin_shufflevector(v, v, (i / n * n + pixel(c, i % n))...);
  }

  template <size_t... c>
  static DDPM_HD void split(Vectors& v, std::index_sequence<c...>) {
    move<true>(v, Places());
    const Vectors channels = {sort<c>(v[first(c)], Places())...};
    ((v[c] = channels[c]), ...);
  }
  template <size_t... c>
  static DDPM_HD void join(Vectors& v, std::index_sequence<c...>) {
    Vectors spread_ones;
    ((spread_ones[first(c)] = spread<c>(v[c], Places())), ...);
    ((v[c] = spread_ones[c]), ...);
    move<false>(v, Places());
  }
};

template <class T, int64_t kChannels>
struct FewChannels {
  static constexpr int64_t kHalf = kChannels / 2, kBytes = 16 * kMostPieces<T>;
  static constexpr bool kPairs = kChannels % 2 == 0;
  // Permutations of 16 bits stay within 16 bytes. Pairs, which twice as many bits hold, are permuted as one.
  using P = std::conditional_t<sizeof(T) == 2 && !kPairs, Pieces<kBytes / 16, T>, Pieces<1, T, kBytes>>;
  using Two = Pieces<1, std::conditional_t<sizeof(T) == 2, uint32_t, uint64_t>, kBytes>;
  using Odd = std::conditional_t<kPairs, OddChannels<Two, kHalf>, OddChannels<P, kChannels>>;
  using Places = std::make_index_sequence<P::kAll>;
  using Vector = typename P::Vector;
  using Pair = typename Two::Vector;

  // The first or the second channel of pairs.
  template <int64_t kWhich, size_t... i>
  static DDPM_HD Vector one(Pair a, Pair b, std::index_sequence<i...>) {
    return __builtin_shufflevector(Vector(a), Vector(b), (2 * i + kWhich)...);
  }
  // The pairs of the first or the second half of two channels.
  template <int64_t kWhich, size_t... i>
  static DDPM_HD Pair two(Vector a, Vector b, std::index_sequence<i...>) {
    return Pair(__builtin_shufflevector(a, b, (kWhich * P::kAll / 2 + i / 2 + i % 2 * P::kAll)...));
  }

  static DDPM_HD void split(Vector (&v)[kChannels]) {
    if constexpr (kPairs) {
      Pair a[kHalf], b[kHalf];
      for (int64_t c = 0; c < kHalf; ++c) a[c] = Pair(v[c]), b[c] = Pair(v[kHalf + c]);
      Odd::split(a, typename Odd::Channels());
      Odd::split(b, typename Odd::Channels());
      for (int64_t c = 0; c < kHalf; ++c) {
        v[2 * c] = one<0>(a[c], b[c], Places());
        v[2 * c + 1] = one<1>(a[c], b[c], Places());
      }
    } else {
      Odd::split(v, typename Odd::Channels());
    }
  }
  static DDPM_HD void join(Vector (&v)[kChannels]) {
    if constexpr (kPairs) {
      Pair a[kHalf], b[kHalf];
      for (int64_t c = 0; c < kHalf; ++c) {
        a[c] = two<0>(v[2 * c], v[2 * c + 1], Places());
        b[c] = two<1>(v[2 * c], v[2 * c + 1], Places());
      }
      Odd::join(a, typename Odd::Channels());
      Odd::join(b, typename Odd::Channels());
      for (int64_t c = 0; c < kHalf; ++c) v[c] = Vector(a[c]), v[kHalf + c] = Vector(b[c]);
    } else {
      Odd::join(v, typename Odd::Channels());
    }
  }

  // Both do whole vectors, and return how many pixels those are. The first one writes the channels that are wanted. If
  // that is some of them, `from` may be any of a pixel's channels, and memory may end behind the last one wanted.
  static DDPM_HD int64_t split_pixels(const T* from, T* to, int64_t out, int64_t pixels, int64_t wanted) {
    const int64_t whole = (pixels - (wanted < kChannels)) / P::kAll * P::kAll;
    for (int64_t k = 0; k < whole; k += P::kAll) {
      Vector v[kChannels];
      for (int64_t s = 0; s < kChannels; ++s)
        v[s] = P::load(from + kChannels * k + s * P::kPiece, kChannels * P::kPiece);
      split(v);
      for (int64_t c = 0; c < kChannels; ++c)
        if (c < wanted) memcpy(to + c * out + k, &v[c], sizeof(Vector));
    }
    return whole;
  }
  static DDPM_HD int64_t join_pixels(const T* from, int64_t in, T* to, int64_t pixels) {
    const int64_t whole = pixels / P::kAll * P::kAll;
    for (int64_t k = 0; k < whole; k += P::kAll) {
      Vector v[kChannels];
      for (int64_t c = 0; c < kChannels; ++c) memcpy(&v[c], from + c * in + k, sizeof(Vector));
      join(v);
      for (int64_t s = 0; s < kChannels; ++s)
        scatter<P::kPiece * sizeof(T)>(v[s], to + kChannels * k + s * P::kPiece, kChannels * P::kPiece);
    }
    return whole;
  }
};
#else
template <int64_t kChannels>
constexpr bool kByVectors = false;
#endif

// Transposes if one of the two sides has pixels of kChannels channels, of which some or all are wanted, and returns
// whether.
template <int64_t kChannels, class T>
bool transpose_few(const T* from, int64_t in, T* to, int64_t out, int64_t rows, int64_t columns) {
  int64_t done = 0;
  if (in == kChannels && rows <= kChannels && 2 * rows >= kChannels) {
    if constexpr (kByVectors<kChannels>) done = FewChannels<T, kChannels>::split_pixels(from, to, out, columns, rows);
    if (rows == kChannels) {
      split_channels<kChannels>(from + in * done, to + done, out, columns - done);
    } else {
      for (; done < columns; ++done)
        for (int64_t r = 0; r < rows; ++r) to[r * out + done] = from[in * done + r];
    }
    return true;
  }
  if (columns != kChannels || out != kChannels) return false;
  if constexpr (kByVectors<kChannels>) done = FewChannels<T, kChannels>::join_pixels(from, in, to, rows);
  join_channels<kChannels>(from + done, in, to + kChannels * done, rows - done);
  return true;
}

}  // namespace
}  // namespace ddpm_ext::DDPM_ISA
