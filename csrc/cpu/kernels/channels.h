// Copies between memory where a pixel's channels are neighbours and memory where a channel's pixels are, `apart`
// elements from one channel to the next. Loops over a number of channels that the compiler knows become permutations of
// vectors, and are as fast as a plain copy.
#pragma once

namespace ddpm_ext::DDPM_ISA {
namespace {

template <int kChannels, class T>
bool split_channels(const T* __restrict from, T* __restrict to, int64_t apart, int64_t pixels) {
  for (int64_t i = 0; i < pixels; ++i)
    for (int c = 0; c < kChannels; ++c) to[c * apart + i] = from[i * kChannels + c];
  return true;
}

template <int kChannels, class T>
bool join_channels(const T* __restrict from, int64_t apart, T* __restrict to, int64_t pixels) {
  for (int64_t i = 0; i < pixels; ++i)
    for (int c = 0; c < kChannels; ++c) to[i * kChannels + c] = from[c * apart + i];
  return true;
}

#define DDPM_BY_CHANNELS(copy)                         \
  const T* const source = static_cast<const T*>(from); \
  T* const target = static_cast<T*>(to);               \
  switch (channels) {                                  \
    case 3:                                            \
      return copy(3);                                  \
    case 4:                                            \
      return copy(4);                                  \
    case 8:                                            \
      return copy(8);                                  \
    case 16:                                           \
      return copy(16);                                 \
    default:                                           \
      return false;                                    \
  }

// These copy nothing and return false if samples rarely have that number of channels.
template <class T>
bool split(int64_t channels, const void* from, void* to, int64_t apart, int64_t pixels) {
#define DDPM_COPY(number) split_channels<number>(source, target, apart, pixels)
  DDPM_BY_CHANNELS(DDPM_COPY)
#undef DDPM_COPY
}
template <class T>
bool join(int64_t channels, const void* from, void* to, int64_t apart, int64_t pixels) {
#define DDPM_COPY(number) join_channels<number>(source, apart, target, pixels)
  DDPM_BY_CHANNELS(DDPM_COPY)
#undef DDPM_COPY
}
#undef DDPM_BY_CHANNELS

}  // namespace
}  // namespace ddpm_ext::DDPM_ISA
