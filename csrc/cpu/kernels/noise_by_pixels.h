// Draws noise for samples whose order in memory is (pixels, channels). The noise is defined by logical indices, whose
// order is (channels, pixels).
//
// A Philox block is the noise of one channel of four neighbouring pixels. Four neighbouring pixels are called a four,
// and all channels of one pixel, which are contiguous in memory, are called a stretch. Blocks are drawn in the order
// (fours, channels): the lanes of a vector of blocks are all channels of one four, then all channels of the next four.
// A vector of blocks gives four vectors of normals, z[0] to z[3]. z[k] has the stretch of pixel k of one four, then the
// stretch of pixel k of the next four.
//
// How the normals get into memory order depends on the number of channels:
// - If a vector consists of whole stretches, its lanes are permuted in registers.
// - If a stretch consists of whole vectors, each vector is stored at its final position.
// - Otherwise a group of vectors is stored in a buffer, and then copied stretch by stretch into memory order. A group
//   is the smallest number of blocks that is both whole vectors and whole stretches.
#pragma once

#include <numeric>
#include <utility>

#include "cpu/kernel_table.h"

namespace ddpm_ext::DDPM_ISA {
namespace {

// Permutes the lanes of four vectors into memory order. Before, z[k] has all channels of pixel k of each four. A vector
// consists of the channels of whole pixels.
template <size_t kChannels, size_t... i>
DDPM_HD void order_vectors(F32 (&z)[4], std::index_sequence<i...>) {
  constexpr size_t n = F32::kLanes, kHalf = n / 2;
  const auto lower = [](F32 a, F32 b) { return choose<(i < kHalf ? i : i + kHalf)...>(a, b); };
  const auto upper = [](F32 a, F32 b) { return choose<(i < kHalf ? i + kHalf : i + n)...>(a, b); };
  const F32 halves[] = {lower(z[0], z[1]), lower(z[2], z[3]), upper(z[0], z[1]), upper(z[2], z[3])};
  for (int j = 0; j < 4; j += 2) {
    const F32 a = halves[j], b = halves[j + 1];  // each has two pixels of half of the fours
    // Returns the lane of a and b (the lanes of b follow those of a) that goes to lane l of z[j], or of z[j + 1] if
    // `half` is 1.
    constexpr auto lane = [](size_t l, size_t half) {
      const size_t pixel = l / kChannels % 4, four = l / (4 * kChannels) + half * n / (4 * kChannels);
      return pixel / 2 * n + pixel % 2 * kHalf + four * kChannels + l % kChannels;
    };
    z[j] = kChannels == kHalf ? a : choose<lane(i, 0)...>(a, b);
    z[j + 1] = kChannels == kHalf ? b : choose<lane(i, 1)...>(a, b);
  }
}

// Fills memory.products. Its first vector is the products of kPhiloxM0 and the block numbers of a group's first vector.
// The following vectors are the increments of these products from each vector of the group to the next one. Later runs
// of this thread with the same layout use them, too.
__attribute__((noinline)) void number_blocks(PixelsMemory& memory, int64_t group, const PixelsRun& run) {
  constexpr int64_t n = F32::kLanes;
  memory.channels = run.channels, memory.fours_in_sample = run.fours_in_sample;
  for (int64_t first = 0; first <= group; first += n) {
    uint32_t numbers[n];
    for (int64_t i = 0; i < n; ++i) {
      const int64_t number = first + i;  // in the order (fours, channels)
      numbers[i] = static_cast<uint32_t>(number % run.channels * run.fours_in_sample + number / run.channels);
    }
    U32 blocks;
    memcpy(&blocks, numbers, sizeof(numbers));
    const bool logical = run.channels == 1;
    const Words words = logical ? block_words(static_cast<uint32_t>(first)) : words_in_order(blocks);
    const Products products = multiply_wide(words, kPhiloxM0);
    memcpy(memory.products + first, &products, sizeof(products));
  }
  for (int64_t i = group + n; --i >= n;) memory.products[i] -= memory.products[i - n];
}

// Copies the noise of a group of `group` Philox blocks into memory order, (pixels, channels). In memory.drawn, array k,
// which starts at k * kMostDrawn, has all channels of pixel k of each four. A stretch, which is all channels of one
// pixel, is copied with kFloats elements at a time: one copy, or several with kLonger. A copy may extend beyond its
// stretch, and the next copy overwrites the excess.
template <int64_t kFloats, bool kLonger = false>
DDPM_HD void copy_stretches(PixelsMemory& memory, int64_t group) {
  const int64_t channels = memory.channels;
  const float* from = memory.drawn;
  float* into = memory.ordered;
  for (const float* const end = into + 4 * group; into < end; from += channels)
    for (int64_t k = 0; k < 4; ++k, into += channels)
      for (int64_t i = 0; i < (kLonger ? channels : 1); i += kFloats)
        memcpy(into + i, from + k * kMostDrawn + i, kFloats * sizeof(float));
}

// For three channels: moves the noise of pixel k of each four to the lanes that it has in the results of join_pixels.
template <size_t k, size_t... i>
DDPM_HD F32 rotate_pixels(F32 w, std::index_sequence<i...>) {
  constexpr size_t n = F32::kLanes;
  constexpr auto lane = [](size_t to) {
    size_t l = 0;
    while (l < n - 1 && (l / 3 * 12 + 3 * k + l % 3) % n != to) ++l;
    return l;
  };
  return choose<lane(i)...>(w, w);
}

// For three channels: the noise of F32::kLanes pixels fills three vectors. Returns vector v of them, in memory order.
// w[k] has the noise of pixel k of each four.
template <size_t v, size_t... i>
DDPM_HD F32 join_pixels(const F32 (&w)[4], std::index_sequence<i...>) {
  constexpr size_t n = F32::kLanes;
  // Returns the lane of w[0] and w[1], or of w[2] and w[3], that has element e of the three vectors. With 8 lanes,
  // rotate_pixels has already moved the elements.
  constexpr auto lane = [](size_t e) { return e / 3 % 2 * n + (n == 8 ? e % n : e / 12 * 3 + e % 3); };
  const F32 a = choose<lane(v * n + i)...>(w[0], w[1]), b = choose<lane(v * n + i)...>(w[2], w[3]);
  return choose<((v * n + i) / 6 % 2 * n + i)...>(a, b);
}

// Does the same as copy_stretches for three channels, by permutations of lanes. With 16 lanes, copy_stretches takes
// twice as many instructions. With 8 lanes it takes as many instructions, but makes a step take up to a twentieth
// longer.
template <size_t... i>
DDPM_HD void join_stretches(PixelsMemory& memory, int64_t group, std::index_sequence<i...> lanes) {
  constexpr int64_t n = F32::kLanes;
  for (int64_t first = 0; first < group; first += n / 4 * 3) {  // the blocks of n pixels
    F32 w[4];
    for (int k = 0; k < 4; ++k) w[k] = load(memory.drawn + k * kMostDrawn + first);
    if constexpr (n == 8) {
      w[0] = rotate_pixels<0>(w[0], lanes), w[1] = rotate_pixels<1>(w[1], lanes);
      w[2] = rotate_pixels<2>(w[2], lanes), w[3] = rotate_pixels<3>(w[3], lanes);
    }
    float* const into = memory.ordered + 4 * first;
    store(into, join_pixels<0>(w, lanes));
    store(into + n, join_pixels<1>(w, lanes));
    store(into + 2 * n, join_pixels<2>(w, lanes));
  }
}

// Copies a group's noise into memory order, for any number of channels. There is no early return for three channels:
// with one, the AVX2 code of g++ makes the forward process take a twentieth longer.
DDPM_HD void order_stretches(PixelsMemory& memory, int64_t group) {
  if (memory.channels == 3 && F32::kLanes >= 8) {
    if constexpr (F32::kLanes >= 8) join_stretches(memory, group, std::make_index_sequence<F32::kLanes>());
  } else if (memory.channels <= 4) {
    copy_stretches<4>(memory, group);
  } else if (memory.channels <= 8) {
    copy_stretches<8>(memory, group);
  } else if (memory.channels <= 16) {
    copy_stretches<16>(memory, group);
  } else if (memory.channels <= 32) {
    copy_stretches<32>(memory, group);
  } else {
    copy_stretches<16, true>(memory, group);
  }
}

// Does the same as copy_stretches for kChannels channels, which are known at compile time, without a loop. Does nothing
// and returns false if memory.channels is another number.
template <int64_t kChannels, size_t... i>
DDPM_HD bool copy_known(PixelsMemory& memory, std::index_sequence<i...>) {
  if (memory.channels != kChannels) return false;
  constexpr size_t kBytes = (kChannels <= 8 ? 8 : 16) * sizeof(float);
  (memcpy(memory.ordered + i * kChannels, memory.drawn + i % 4 * kMostDrawn + i / 4 * kChannels, kBytes), ...);
  return true;
}
// Calls copy_known with the indices of all stretches of a group.
template <int64_t kChannels>
DDPM_HD bool order_known(PixelsMemory& memory) {
  return copy_known<kChannels>(memory, std::make_index_sequence<4 * std::lcm(kChannels, F32::kLanes) / kChannels>());
}

// Copies a group's noise into memory order, like order_stretches. This function is not inlined. There is one copy of it
// for all kernels, so it can have special code for the numbers of channels that take the most time.
__attribute__((noinline)) void call_order_stretches(PixelsMemory& memory, int64_t group) {
  const bool done =
      order_known<5>(memory) || order_known<6>(memory) || order_known<7>(memory) || order_known<12>(memory);
  if (!done) order_stretches(memory, group);
}

// The noise of a run in memory order, four vectors at a time. The noise is drawn some vectors before the kernel uses
// it. A run in logical order has channels = 1.
class NoiseByPixels {
 public:
  explicit NoiseByPixels(const PixelsRun& run)
      : memory_(*run.memory), channels_(run.channels), group_(blocks_of_group(channels_)) {
    if (memory_.channels != channels_ || memory_.fours_in_sample != run.fours_in_sample)
      number_blocks(memory_, group_, run);
    products_ = load_products(memory_.products) + uint64_t{kPhiloxM0} * static_cast<uint32_t>(run.block / channels_);
  }

  // The number of elements between the element whose noise is drawn and the element whose noise the kernel uses.
  DDPM_HD int64_t ahead() const { return in_registers() ? kFour : 4 * group_ + 2 * kFour; }

  // Returns the products of kPhiloxM0 and the block numbers of the next vector.
  DDPM_HD Products next() {
    const Products products = products_;
    products_ = products_ + load_products(step_);
    step_ += F32::kLanes;
    step_ = step_ == end_ ? first_ : step_;  // without a branch, so that instructions overlap
    return products;
  }

  // Takes the normals of the next vector of blocks in z, where z[k] has element k of each block. Replaces z by the
  // noise that the kernel uses next.
  //
  // A load from memory that was stored just before has to wait. So a group is copied into memory order one call after
  // its last vector was stored, and the kernel uses it from the following call on. At the end of a run no more noise is
  // drawn, and the z that is stored then is never used.
  DDPM_HD void exchange(F32 (&z)[4]) {
    if (in_registers()) return order(z, std::make_index_sequence<F32::kLanes>());
    F32 noise[4];
    for (int k = 0; k < 4; ++k) noise[k] = load(used_ + k * F32::kLanes);
    used_ += kFour;
    if (drawn_ == end_of_drawn_) {
      // A function call in the loop makes g++ keep the loop's values in memory. With the 32 registers of AVX-512 (16
      // lanes) the call still takes less time than the inlined code.
      if (has_whole_vectors())
        std::swap(drawn_group_, used_group_);
      else
        F32::kLanes == 16 ? call_order_stretches(memory_, group_) : order_stretches(memory_, group_);
      drawn_ = drawn_group_, end_of_drawn_ = drawn_ + group_, used_ = used_group_;
    }
    for (int k = 0; k < 4; ++k) {
      store(drawn_ + k * pixel_stride_, z[k]);
      z[k] = noise[k];
    }
    drawn_ += F32::kLanes;
  }

 private:
  static constexpr int64_t kFour = 4 * F32::kLanes;

  static int64_t blocks_of_group(int64_t channels) { return std::lcm(channels, F32::kLanes); }

  DDPM_HD bool in_registers() const { return group_ == F32::kLanes; }
  // Whether all channels of a pixel are whole vectors. Such vectors are stored at their final positions.
  DDPM_HD bool has_whole_vectors() const { return group_ == channels_; }

  template <size_t... i>
  DDPM_HD void order(F32 (&z)[4], std::index_sequence<i...> lanes) {
    if (channels_ == 1) transpose(z);
    if (channels_ == 2) order_vectors<2>(z, lanes);
    if constexpr (F32::kLanes > 4)
      if (channels_ == 4) order_vectors<4>(z, lanes);
    if constexpr (F32::kLanes > 8)
      if (channels_ == 8) order_vectors<8>(z, lanes);
  }

  DDPM_HD static Products load_products(const uint64_t* from) {
    return *reinterpret_cast<const Products*>(from);  // with memcpy, g++ copies through the stack
  }

  PixelsMemory& memory_;
  const int64_t channels_, group_;
  const int64_t pixel_stride_ = has_whole_vectors() ? channels_ : kMostDrawn;  // from z[k] to z[k + 1] in the buffer
  float *drawn_group_ = memory_.drawn, *used_group_ = memory_.ordered;
  float *end_of_drawn_ = drawn_group_ + group_, *drawn_ = end_of_drawn_;  // drawn_: where z is stored next
  const float* used_ = used_group_;                                       // the noise that is used next
  const uint64_t *const first_ = memory_.products + F32::kLanes, *const end_ = first_ + group_;
  const uint64_t* step_ = first_;
  Products products_;
};

}  // namespace
}  // namespace ddpm_ext::DDPM_ISA
