// Takes some of the channels of pixels: brings those of each pixel together, or the pixels of each channel. Mostly they
// are half of a model's output, whose other half is the learned variance.
#pragma once

#include "cpu/kernels/few_channels.h"

namespace ddpm_ext::DDPM_ISA {
namespace {

// Copies rows of more than half of kBytes, which are `in` elements apart, one behind the other. What a copy of kBytes
// writes beyond a row, the next row's replaces.
template <int64_t kBytes, class T>
void pack_rows(const T* from, int64_t in, T* to, int64_t rows, int64_t columns) {
  for (int64_t r = 0; r + 1 < rows; ++r, from += in, to += columns) memcpy(to, from, kBytes);
  for (int64_t c = 0; c < columns && rows > 0; ++c) to[c] = from[c];
}

#if (defined(__clang__) || __GNUC__ >= 12) && !defined(DDPM_WITHOUT_FMA)
// A vector's elements are taken from two vectors in memory: one begins with the first of them, one ends with the last.
// So nothing is read behind the half of the last pixel.
template <class T, int64_t kHalf>
struct Halves {
  using P = Pieces<1, T, sizeof(Floats)>;
  using Vector = typename P::Vector;
  static constexpr int64_t n = P::kAll, kPixels = n / kHalf, kAhead = 4096 / sizeof(T);
  static constexpr bool kOdd = kHalf % 2 == 1;
  using Places = std::make_index_sequence<n>;
  using Vectors = std::make_index_sequence<kHalf>;  // of n pixels

  // Where element i of the halves is, one behind the other.
  static constexpr int64_t place(int64_t i) { return i / kHalf * 2 * kHalf + i % kHalf; }

  // Vector s of n pixels. Its elements are one behind the other, or the pixels of each channel are together.
  template <int64_t s, bool kByChannel, size_t... i>
  static DDPM_HD Vector load(const T* from, std::index_sequence<i...>) {
    constexpr int64_t kBegin = place(s * n), kLast = place(s * n + n - 1) - n + 1;
    constexpr int64_t places[] = {place(s * n + (kByChannel ? i % kPixels * kHalf + i / kPixels : i))...};
    return __builtin_shufflevector(P::load(from + kBegin, 0), P::load(from + kLast, 0),
                                   (places[i] < kBegin + n ? places[i] - kBegin : places[i] - kLast + n)...);
  }

  // Of a and b, which have kRun elements of each of some channels, one half of the channels: 2 * kRun of each.
  template <int64_t kRun, bool kUpper, size_t... i>
  static DDPM_HD Vector merge(Vector a, Vector b, std::index_sequence<i...>) {
    return __builtin_shufflevector(a, b,
                                   (i / kRun % 2 * n + (kUpper ? n / 2 : 0) + i / (2 * kRun) * kRun + i % kRun)...);
  }
  template <int64_t kRun = kPixels>
  static DDPM_HD void merge_all(Vector (&v)[kHalf]) {
    if constexpr (kRun < n) {
      constexpr int64_t kPairs = n / kRun / 2;  // that have the same channels
      Vector next[kHalf];
      for (int64_t i = 0; i < kHalf / 2; ++i) {
        const int64_t to = i / kPairs * 2 * kPairs + i % kPairs;
        next[to] = merge<kRun, false>(v[2 * i], v[2 * i + 1], Places());
        next[to + kPairs] = merge<kRun, true>(v[2 * i], v[2 * i + 1], Places());
      }
      for (int64_t i = 0; i < kHalf; ++i) v[i] = next[i];
      merge_all<2 * kRun>(v);
    }
  }

  // Both do whole vectors, and return how many pixels those are. A core reads elsewhere between two calls, so it does
  // not fetch far enough ahead itself.
  static int64_t pack(const T* from, T* to, int64_t pixels) {
    return for_vectors<false>(from, pixels, Vectors(), [=](int64_t k, const Vector(&v)[kHalf]) {
      // Each on its own: all at once, g++ also writes them to the stack.
      for (int64_t s = 0; s < kHalf; ++s) memcpy(to + kHalf * k + s * n, &v[s], sizeof(Vector));
    });
  }
  static int64_t split(const T* from, T* to, int64_t out, int64_t pixels) {
    return for_vectors<!kOdd>(from, pixels, Vectors(), [=](int64_t k, Vector(&v)[kHalf]) {
      if constexpr (kOdd)
        OddChannels<P, kHalf>::split(v, Vectors());
      else
        merge_all(v);
      for (int64_t c = 0; c < kHalf; ++c) memcpy(to + c * out + k, &v[c], sizeof(Vector));
    });
  }
  template <bool kByChannel, size_t... s, class Use>
  static DDPM_HD int64_t for_vectors(const T* from, int64_t pixels, std::index_sequence<s...>, Use use) {
    const int64_t whole = pixels / n * n;
    for (int64_t k = 0; k < whole; k += n, from += 2 * kHalf * n) {
      for (int64_t i = 0; i < 2 * kHalf; ++i) __builtin_prefetch(from + i * n + kAhead);
      Vector v[] = {load<s, kByChannel>(from, Places())...};
      use(k, v);
    }
    return whole;
  }
};
#endif

// Calls one(Halves<T, kHalf>()) if that has code for half of `in` channels, and returns how many pixels it did.
template <class T, class One>
int64_t by_halves(int64_t in, int64_t channels, One one) {
#if (defined(__clang__) || __GNUC__ >= 12) && !defined(DDPM_WITHOUT_FMA)
  if constexpr (sizeof(Floats) >= 32) {
    if (in != 2 * channels) return 0;
    if (channels == 3) return one(Halves<T, 3>());
    if (channels == 4) return one(Halves<T, 4>());
    if (channels == 8) return one(Halves<T, 8>());
  }
#endif
  return 0;
}

// Of a transposition of so many of `in` channels, the pixels of whole vectors, whose number is returned.
template <class T>
int64_t split_halves(const T* from, int64_t in, T* to, int64_t out, int64_t channels, int64_t pixels) {
  // AVX2 permutes 16 bits by several instructions: whole pixels of 6 and blocks of 16 channels take fewer.
  if (sizeof(T) == 2 && sizeof(Floats) < 64 && channels != 4) return 0;
  return by_halves<T>(in, channels, [=](auto halves) { return halves.split(from, to, out, pixels); });
}

// to[r * columns + c] = from[r * in + c], for rows of 5 to 32 bytes. Returns whether they have so many.
template <class T>
bool pack(const void* source, int64_t in, void* target, int64_t rows, int64_t columns) {
  const T* const from = static_cast<const T*>(source);
  T* const to = static_cast<T*>(target);
  const int64_t bytes = columns * static_cast<int64_t>(sizeof(T));
  if (bytes <= 4 || bytes > 32) return false;
  const int64_t done = by_halves<T>(in, columns, [=](auto halves) { return halves.pack(from, to, rows); });
  const auto rest = bytes <= 8 ? pack_rows<8, T> : bytes <= 16 ? pack_rows<16, T> : pack_rows<32, T>;
  rest(from + in * done, in, to + columns * done, rows - done, columns);
  return true;
}

}  // namespace
}  // namespace ddpm_ext::DDPM_ISA
