// Draws noise in the order (pixels, channels), where that of logical indices, which the noise follows, is
// (channels, pixels).
//
// A block of Philox is the noise of one channel of four pixels. The lanes of vectors of blocks are all channels of one
// four of pixels, then those of the next. So the vectors of normals of the fours' first pixels have all channels of one
// such pixel, a stretch of memory, then those of the next, and so on for the second pixels. Where a vector has whole
// stretches, it is put in order in registers. Otherwise all are stored, and stretch after stretch is copied to where it
// belongs. The vectors up to one that ends with a stretch are a group.
#pragma once

#include "cpu/kernel_table.h"

namespace ddpm_ext::DDPM_ISA {
namespace {

// Puts vectors of whole stretches, z[k] with those of the k-th pixels, into the order of memory.
template <size_t kChannels, size_t... i>
DDPM_HD void order_vectors(F32 (&z)[4], std::index_sequence<i...>) {
  constexpr size_t n = F32::kLanes, kHalf = n / 2;
  const auto lower = [](F32 a, F32 b) { return choose<(i < kHalf ? i : i + kHalf)...>(a, b); };
  const auto upper = [](F32 a, F32 b) { return choose<(i < kHalf ? i + kHalf : i + n)...>(a, b); };
  const F32 halves[] = {lower(z[0], z[1]), lower(z[2], z[3]), upper(z[0], z[1]), upper(z[2], z[3])};
  for (int j = 0; j < 4; j += 2) {
    const F32 a = halves[j], b = halves[j + 1];  // each with halves of two pixels
    // The lane of a and b from which lane l comes, in the first or the second half of what they make.
    constexpr auto lane = [](size_t l, size_t half) {
      const size_t pixel = l / kChannels % 4, four = l / (4 * kChannels) + half * n / (4 * kChannels);
      return pixel / 2 * n + pixel % 2 * kHalf + four * kChannels + l % kChannels;
    };
    z[j] = kChannels == kHalf ? a : choose<lane(i, 0)...>(a, b);
    z[j + 1] = kChannels == kHalf ? b : choose<lane(i, 1)...>(a, b);
  }
}

// Computes the products of the first vector's numbers of blocks with kPhiloxM0, and what is added to them from each
// vector of a group to the next. They stay for the runs of this thread that follow.
__attribute__((noinline)) void number_blocks(PixelsMemory& memory, int64_t vectors, const PixelsRun& run) {
  constexpr int64_t n = F32::kLanes;
  memory.channels = run.channels, memory.fours_in_sample = run.fours_in_sample;
  for (int64_t vector = 0; vector <= vectors; ++vector) {
    uint32_t numbers[n];
    for (int64_t i = 0; i < n; ++i) {
      const int64_t number = vector * n + i;  // in the order (fours of pixels, channels)
      numbers[i] = static_cast<uint32_t>(number % run.channels * run.fours_in_sample + number / run.channels);
    }
    U32 blocks;
    memcpy(&blocks, numbers, sizeof(numbers));
    const bool logical = run.channels == 1;
    const Words words = logical ? block_words(static_cast<uint32_t>(vector * n)) : words_in_order(blocks);
    const Products products = multiply_wide(words, kPhiloxM0);
    memcpy(memory.products + vector * n, &products, sizeof(products));
  }
  for (int64_t i = (vectors + 1) * n; --i >= n;) memory.products[i] -= memory.products[i - n];
}

// Copies stretches until four vectors after those that are used next are in order. What is behind a stretch, up to
// kFloats, is overwritten by the next one.
template <int64_t kFloats>
DDPM_HD void copy_stretches(PixelsMemory& memory) {
  const int64_t channels = memory.channels;
  const float* from = memory.from;
  float* into = memory.into;
  for (const float* const until = memory.used + 4 * F32::kLanes; into < until; from += channels)
    for (int64_t k = 0; k < 4; ++k, into += channels)
      for (int64_t i = 0; i < (kFloats < 16 ? 1 : channels); i += kFloats)
        memcpy(into + i, from + k * kMostDrawn + i, kFloats * sizeof(float));
  memory.from = from, memory.into = into;
}

DDPM_HD void order_stretches(PixelsMemory& memory) {
  memory.used += 4 * F32::kLanes;
  if (memory.used == memory.end) memory.used = memory.into = memory.ordered, memory.from = memory.drawn[0];
  if (memory.channels <= 4)
    copy_stretches<4>(memory);
  else if (memory.channels <= 8)
    copy_stretches<8>(memory);
  else
    copy_stretches<16>(memory);
}

// The same for vectors with few registers, all of which a kernel needs.
__attribute__((noinline)) void order_apart(PixelsMemory& memory) { order_stretches(memory); }

// The noise of a run, four vectors at a time, which is drawn some vectors before a kernel uses it. In logical order
// there is one channel.
class NoiseByPixels {
 public:
  explicit NoiseByPixels(const PixelsRun& run)
      : memory_(*run.memory), channels_(run.channels), vectors_(vectors_of_group(channels_)) {
    memory_.to = memory_.drawn[0], memory_.end = memory_.ordered + 2 * vectors_ * kFour;
    memory_.used = memory_.end - (vectors_ + 2) * kFour;  // so that nothing is copied before there is something
    memory_.into = memory_.end;
    if (memory_.channels != channels_ || memory_.fours_in_sample != run.fours_in_sample)
      number_blocks(memory_, vectors_, run);
    products_ = load_products(memory_.products) + uint64_t{kPhiloxM0} * static_cast<uint32_t>(run.block / channels_);
  }

  // The elements by which drawing is ahead of use. A stretch is copied a vector after the last part of it was stored,
  // and used a vector later: what is loaded while it is still being stored is waited for.
  DDPM_HD int64_t ahead() const { return (in_registers() ? 1 : vectors_ + 3) * kFour; }

  // The products with kPhiloxM0 of the numbers of the next vector's blocks.
  DDPM_HD Products next() {
    const Products products = products_;
    products_ = products_ + load_products(step_);
    step_ += F32::kLanes;
    step_ = step_ == end_ ? first_ : step_;  // a branch would keep apart what is drawn in parallel
    return products;
  }

  // Takes the normals of the next vector of blocks, z[k] with element k of each.
  DDPM_HD void add(F32 (&z)[4]) {
    if (in_registers()) return order(z, std::make_index_sequence<F32::kLanes>());
    for (int k = 0; k < 4; ++k) store(memory_.to + k * kMostDrawn, z[k]);
    memory_.to += F32::kLanes;
    if (memory_.to == memory_.drawn[0] + 2 * vectors_ * F32::kLanes) memory_.to = memory_.drawn[0];
  }

  // Gets the noise that is used next. In registers, it is what was added.
  DDPM_HD void get(F32 (&z)[4]) {
    if (in_registers()) return;
    for (int k = 0; k < 4; ++k) z[k] = load(memory_.used + k * F32::kLanes);
    F32::kLanes == 16 ? order_stretches(memory_) : order_apart(memory_);
  }

 private:
  static constexpr int64_t kFour = 4 * F32::kLanes;

  static int64_t vectors_of_group(int64_t channels) {
    const int64_t power_of_two = channels & -channels;  // the largest one that divides them
    return channels / (power_of_two < F32::kLanes ? power_of_two : F32::kLanes);
  }

  DDPM_HD bool in_registers() const { return vectors_ == 1; }

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
    Products products;
    memcpy(&products, from, sizeof(products));
    return products;
  }

  PixelsMemory& memory_;
  const int64_t channels_, vectors_;  // of a group
  const uint64_t *const first_ = memory_.products + F32::kLanes, *const end_ = first_ + vectors_ * F32::kLanes;
  const uint64_t* step_ = first_;
  Products products_;
};

}  // namespace
}  // namespace ddpm_ext::DDPM_ISA
