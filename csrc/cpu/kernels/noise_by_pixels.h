// Draws noise in the order (pixels, channels), where that of logical indices, which the noise follows, is
// (channels, pixels).
#pragma once

#include "cpu/kernel_table.h"

namespace ddpm_ext::DDPM_ISA {
namespace {

// Before, z[k] has pixel k of each of kFours fours. Afterwards the fours follow each other.
template <int kFours, size_t... i>
DDPM_HD void join_fours(F32 (&z)[4], std::index_sequence<i...>) {
  constexpr size_t n = F32::kLanes, kHalf = n / 2, kUnit = n / kFours;
  const auto lower = [](F32 a, F32 b) { return choose<(i < kHalf ? i : i + kHalf)...>(a, b); };
  const auto upper = [](F32 a, F32 b) { return choose<(i < kHalf ? i + kHalf : i + n)...>(a, b); };
  const F32 halves[] = {lower(z[0], z[1]), lower(z[2], z[3]), upper(z[0], z[1]), upper(z[2], z[3])};
  for (int j = 0; j < 4; j += 2) {
    const F32 a = halves[j], b = halves[j + 1];
    z[j] = kFours == 2 ? a : choose<(i / kUnit * 2 * kUnit + i % kUnit)...>(a, b);
    z[j + 1] = kFours == 2 ? b : choose<(i / kUnit * 2 * kUnit + i % kUnit + kUnit)...>(a, b);
  }
}

// The noise of a run, four vectors at a time. A block of Philox has four pixels of a channel. A vector of blocks has
// those of a unit, which is one channel or 4, 8 or 16 neighbouring ones. The vectors of all units of some pixels are a
// group. While a kernel uses a group's noise, the next group is drawn. In logical order there is one channel.
class NoiseByPixels {
 public:
  explicit NoiseByPixels(const PixelsRun& run)
      : memory_(*run.memory),
        shift_(unit_shift(run.channels)),
        units_(run.channels >> shift_),
        used_(units_ + 1),
        to_(memory_.noise) {
    const uint32_t first = static_cast<uint32_t>(run.block / run.channels);
    const auto fours = static_cast<uint32_t>(run.fours_in_sample);
    uint32_t numbers[F32::kLanes];
    for (uint32_t i = 0; i < F32::kLanes; ++i) numbers[i] = first + (i & (unit() - 1)) * fours + (i >> shift_);
    U32 blocks;
    memcpy(&blocks, numbers, sizeof(numbers));
    products_ = multiply_wide(unit() == 1 ? block_words(first) : words_in_order(blocks), kPhiloxM0);
    step_ = uint64_t{kPhiloxM0} * unit() * fours;
    jump_ = uint64_t{kPhiloxM0} * (F32::kLanes >> shift_) - (units_ - 1) * step_;
    if (F32::kLanes > 4 && unit() < F32::kLanes && memory_.channels != run.channels) number_lanes(run.channels);
  }

  // The elements of a group.
  DDPM_HD int64_t group() const { return units_ * kFour; }

  // The products with kPhiloxM0 of the numbers of the next vector's blocks.
  DDPM_HD Products next() {
    const Products products = products_;
    const uint64_t last = ++drawn_ == units_;
    products_ = products_ + (step_ + last * (jump_ - step_));  // a branch would keep apart what is drawn in parallel
    drawn_ -= last * units_;
    return products;
  }

  // Takes the normals of the next vector of blocks, z[k] with element k of each.
  DDPM_HD void add(F32 (&z)[4]) {
    constexpr auto kPlaces = std::make_index_sequence<F32::kLanes>();
    if (unit() == 1) transpose(z);
    if constexpr (F32::kLanes == 16)
      if (unit() == 4) join_fours<4>(z, kPlaces);
    if constexpr (F32::kLanes >= 8)
      if (unit() == F32::kLanes / 2) join_fours<2>(z, kPlaces);
    if (units_ == 1) return;
    const bool last = added_ + 1 == units_;
    if (unit() == F32::kLanes)
      for (int k = 0; k < 4; ++k) store(to_ + (k * units_ + added_) * F32::kLanes, z[k]);
    else if (!last)
      for (int k = 0; k < 4; ++k) store(memory_.rows + added_ * kFour + k * F32::kLanes, z[k]);
    else if (units_ == 3)  // is faster if the compiler knows it
      join_units(z, std::integral_constant<int64_t, 3>());
    else
      join_units(z, units_);
    ++added_;
    if (!last) return;
    added_ = 0;
    to_ = to_ == memory_.noise ? to_ + group() : memory_.noise;
  }

  // Gets the noise that is used next. Where a group is one vector, that is what was added.
  DDPM_HD void get(F32 (&z)[4]) {
    if (units_ == 1) return;
    for (int k = 0; k < 4; ++k) z[k] = load(memory_.noise + used_ * kFour + k * F32::kLanes);
    if (++used_ == 2 * units_) used_ = 0;
  }

 private:
  static constexpr int64_t kFour = 4 * F32::kLanes;

  // The logarithm of unit().
  static int unit_shift(int64_t channels) {
#ifndef DDPM_WITHOUT_FMA  // else drawing takes so long that its order does not count
    for (int shift = 4; shift >= 2; --shift)
      if (1 << shift <= F32::kLanes && (channels & ((1 << shift) - 1)) == 0) return shift;
#endif
    return 0;
  }

  DDPM_HD uint32_t unit() const { return 1u << shift_; }  // channels

  // Joins the units of each pixel. The last row of units is in z, those before it are in memory.
  template <class F, class Units>
  DDPM_HD void join_units(const F (&z)[4], Units units) {
    if constexpr (F::kLanes > 4) {
      const uint32_t* lanes = memory_.lanes;
      for (int64_t vector = 0; vector < units; ++vector) {
        F y[4];
        U32 numbers;
        for (int j = 0; j < 4; ++j) y[j] = load(memory_.rows + j * F::kLanes);
        for (int64_t row = 1; row < units - 1; ++row, lanes += F::kLanes) {
          memcpy(&numbers, lanes, sizeof(numbers));
          for (int j = 0; j < 4; ++j) y[j] = take(y[j], numbers, load(memory_.rows + row * kFour + j * F::kLanes));
        }
        memcpy(&numbers, lanes, sizeof(numbers));
        lanes += F::kLanes;
        for (int j = 0; j < 4; ++j) store(to_ + (j * units + vector) * F::kLanes, take(y[j], numbers, z[j]));
      }
    } else {
      for (int k = 0; k < 4; ++k) store(memory_.rows + added_ * kFour + k * F::kLanes, z[k]);
      for (int64_t i = 0; i < kFour; ++i)
        for (int64_t row = 0; row < units; ++row) to_[i * units + row] = memory_.rows[row * kFour + i];
    }
  }

  // Numbers the lanes that join_units takes, and leaves them to the runs of this thread that follow.
  void number_lanes(int64_t channels) {
    memory_.channels = channels;
    uint32_t* lanes = memory_.lanes;
    for (int64_t vector = 0; vector < units_; ++vector)
      for (int64_t row = 1; row < units_; ++row)
        for (int64_t i = 0; i < F32::kLanes; ++i, ++lanes) {
          const int64_t number = (vector * F32::kLanes + i) >> shift_;  // of a unit in a group
          const int64_t source = number % units_, lane = (number / units_ << shift_) + (i & (unit() - 1));
          *lanes = static_cast<uint32_t>(source == row ? F32::kLanes + lane : source == 0 && row == 1 ? lane : i);
        }
  }

  PixelsMemory& memory_;
  const int shift_;
  const int64_t units_;            // of a pixel
  int64_t drawn_ = 0, added_ = 0;  // vectors of a group
  int64_t used_;                   // vectors of two groups
  float* to_;                      // one of two groups
  Products products_;
  uint64_t step_, jump_;  // of products_, to the next vector and to the first one of the next group
};

}  // namespace
}  // namespace ddpm_ext::DDPM_ISA
