// Draws noise for samples that lie as (pixels, channels) in memory. The noise is defined by logical indices, whose
// order is (channels, pixels).
//
// A Philox block is the noise of one channel of four neighbouring pixels (a "four"). Blocks are drawn in the order
// (fours, channels): the lanes of a vector of blocks are all channels of one four, then all channels of the next four.
// Such a vector gives four vectors of normals, of which z[k] belongs to the k-th pixels of the fours. So z[k] has all
// channels of one pixel, which are contiguous in memory (a "stretch"), then all channels of the k-th pixel of the next
// four.
//
// How the normals get into memory order depends on the number of channels:
// - Whole stretches fit into a vector: the lanes are permuted in registers.
// - Otherwise the vectors are stored. The vectors up to the first one that ends at the end of a stretch are a group. If
//   a stretch has whole vectors, each vector is stored at its final position. Otherwise the group is stored first, and
//   then copied stretch by stretch to the final positions.
#pragma once

#include <numeric>
#include <utility>

#include "cpu/kernel_table.h"

namespace ddpm_ext::DDPM_ISA {
namespace {

// Permutes four vectors of whole stretches into memory order. Before, z[k] has the stretches of the k-th pixels.
template <size_t kChannels, size_t... i>
DDPM_HD void order_vectors(F32 (&z)[4], std::index_sequence<i...>) {
  constexpr size_t n = F32::kLanes, kHalf = n / 2;
  const auto lower = [](F32 a, F32 b) { return choose<(i < kHalf ? i : i + kHalf)...>(a, b); };
  const auto upper = [](F32 a, F32 b) { return choose<(i < kHalf ? i + kHalf : i + n)...>(a, b); };
  const F32 halves[] = {lower(z[0], z[1]), lower(z[2], z[3]), upper(z[0], z[1]), upper(z[2], z[3])};
  for (int j = 0; j < 4; j += 2) {
    const F32 a = halves[j], b = halves[j + 1];  // each has half of the fours of two pixels
    // The lane of a and b that goes to lane l of the first or the second half of the result.
    constexpr auto lane = [](size_t l, size_t half) {
      const size_t pixel = l / kChannels % 4, four = l / (4 * kChannels) + half * n / (4 * kChannels);
      return pixel / 2 * n + pixel % 2 * kHalf + four * kChannels + l % kChannels;
    };
    z[j] = kChannels == kHalf ? a : choose<lane(i, 0)...>(a, b);
    z[j + 1] = kChannels == kHalf ? b : choose<lane(i, 1)...>(a, b);
  }
}

// Computes the products with kPhiloxM0 of the first vector's block numbers, and the increments of the products from
// each vector of a group to the next. They stay in `memory` for this thread's later runs.
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

// Copies the stretches of a group of `group` blocks into memory order, kFloats elements at a time. A copy may extend
// beyond its stretch; the next copy overwrites the excess. With kLonger, a stretch takes several copies.
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

// For three channels: rotates the lanes of the k-th pixels' noise to the lanes that they have in the joined vectors.
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

// For three channels: makes vector v of the three vectors of noise of F32::kLanes pixels, in memory order.
template <size_t v, size_t... i>
DDPM_HD F32 join_pixels(const F32 (&w)[4], std::index_sequence<i...>) {
  constexpr size_t n = F32::kLanes;
  // The lane of w[0] and w[1], or of w[2] and w[3], from which element e comes. With 8 lanes, rotate_pixels has moved
  // it before.
  constexpr auto lane = [](size_t e) { return e / 3 % 2 * n + (n == 8 ? e % n : e / 12 * 3 + e % 3); };
  const F32 a = choose<lane(v * n + i)...>(w[0], w[1]), b = choose<lane(v * n + i)...>(w[2], w[3]);
  return choose<((v * n + i) / 6 % 2 * n + i)...>(a, b);
}

// Does the same as copy_stretches for three channels. With 16 lanes, that many short copies take twice the
// instructions. With 8 lanes they take as many instructions, but a step takes up to a twentieth longer.
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

// Copies a whole group into memory order. With an early return for three channels, g++ orders the AVX2 code such that
// forward_process takes a twentieth longer.
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

// Does the same as copy_stretches() for a number of channels known at compile time, without a loop. Returns whether
// memory.channels is that number.
template <int64_t kChannels, size_t... i>
DDPM_HD bool copy_known(PixelsMemory& memory, std::index_sequence<i...>) {
  if (memory.channels != kChannels) return false;
  constexpr size_t kBytes = (kChannels <= 8 ? 8 : 16) * sizeof(float);
  (memcpy(memory.ordered + i * kChannels, memory.drawn + i % 4 * kMostDrawn + i / 4 * kChannels, kBytes), ...);
  return true;
}
template <int64_t kChannels>
DDPM_HD bool order_known(PixelsMemory& memory) {
  return copy_known<kChannels>(memory, std::make_index_sequence<4 * std::lcm(kChannels, F32::kLanes) / kChannels>());
}

// Not inlined: all kernels share this function, so it can afford specialised code for the numbers of channels that cost
// most.
__attribute__((noinline)) void call_order_stretches(PixelsMemory& memory, int64_t group) {
  const bool done =
      order_known<5>(memory) || order_known<6>(memory) || order_known<7>(memory) || order_known<12>(memory);
  if (!done) order_stretches(memory, group);
}

// The noise of a run, four vectors at a time. It is drawn some vectors before the kernel uses it. In logical order
// `channels` is 1.
class NoiseByPixels {
 public:
  explicit NoiseByPixels(const PixelsRun& run)
      : memory_(*run.memory), channels_(run.channels), group_(blocks_of_group(channels_)) {
    if (memory_.channels != channels_ || memory_.fours_in_sample != run.fours_in_sample)
      number_blocks(memory_, group_, run);
    products_ = load_products(memory_.products) + uint64_t{kPhiloxM0} * static_cast<uint32_t>(run.block / channels_);
  }

  // The number of elements by which drawing is ahead of use.
  DDPM_HD int64_t ahead() const { return in_registers() ? kFour : 4 * group_ + 2 * kFour; }

  // Returns the products of the next vector's block numbers with kPhiloxM0.
  DDPM_HD Products next() {
    const Products products = products_;
    products_ = products_ + load_products(step_);
    step_ += F32::kLanes;
    step_ = step_ == end_ ? first_ : step_;  // no branch, which would stop instructions from overlapping
    return products;
  }

  // Takes the normals of the next vector of blocks in z, where z[k] has element k of each block, and replaces them by
  // the noise that the kernel uses next.
  //
  // A group is ordered one vector after its last vector was stored, and used another vector later, because loading
  // memory that is still being stored has to wait. At the end of a run nothing is drawn any more, and z is stored
  // without being used.
  DDPM_HD void exchange(F32 (&z)[4]) {
    if (in_registers()) return order(z, std::make_index_sequence<F32::kLanes>());
    F32 noise[4];
    for (int k = 0; k < 4; ++k) noise[k] = load(used_ + k * F32::kLanes);
    used_ += kFour;
    if (drawn_ == end_of_drawn_) {
      // Around a call, g++ keeps the values of every iteration in memory. With the 32 registers of AVX-512 the call
      // still costs less than having this code in the loop.
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
  // Whether a stretch consists of whole vectors, which are stored at their final positions.
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
  const int64_t pixel_stride_ = has_whole_vectors() ? channels_ : kMostDrawn;  // between a block's pixels
  float *drawn_group_ = memory_.drawn, *used_group_ = memory_.ordered;
  float *end_of_drawn_ = drawn_group_ + group_, *drawn_ = end_of_drawn_;  // drawn_: where the next vector is stored
  const float* used_ = used_group_;                                       // the noise to use next
  const uint64_t *const first_ = memory_.products + F32::kLanes, *const end_ = first_ + group_;
  const uint64_t* step_ = first_;
  Products products_;
};

}  // namespace
}  // namespace ddpm_ext::DDPM_ISA
