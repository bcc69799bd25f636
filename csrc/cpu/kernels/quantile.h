// The kernels of dynamic thresholding: they compute the magnitudes of the predicted clean sample and select the two
// between which the quantile lies. Magnitudes are compared as integers, in plain loops that the compiler vectorises.
#pragma once

namespace ddpm_ext::DDPM_ISA {
namespace {

// Stores the magnitudes of a run.
template <class X, class M>
void magnitudes(const MagnitudesRun& run) {
  const X* x = static_cast<const X*>(run.x);
  const M* m = static_cast<const M*>(run.model_output);
  const M* u = static_cast<const M*>(run.uncond_output);
  float* to = run.magnitudes;
  const int64_t count = run.count;
  const auto store_all = [&](auto x_start) __attribute__((always_inline)) {
    for (int64_t i = 0; i < count; i += F32::kLanes)
      store(to + i, bits_to_float(float_to_bits(x_start(i)) & U32(kMagnitude)));
  };
  if (run.row == nullptr) return store_all([&](int64_t i) { return load(x + i); });
  const float a = run.row->a, b = run.row->b, w = run.row->w, scale = run.output_scale;
  if (u == nullptr || w == 1.0f)
    return store_all([&](int64_t i) { return unclipped_x_start(a, b, load(x + i), load(m + i) * F32(scale)); });
  store_all(
      [&](int64_t i) { return unclipped_x_start(a, b, load(x + i), guide(w, load(m + i), load(u + i)) * F32(scale)); });
}

// Returns the bits of a magnitude. As signed integers, bits have the order of the magnitudes.
DDPM_HD int32_t order(int32_t bits) { return bits; }
DDPM_HD int32_t order(float magnitude) { return static_cast<int32_t>(ddpm_ext::float_to_bits(magnitude)); }

// Writes the bits of the largest magnitude of each group. A group is a column of a tile (kernel_table.h).
void group_maxima(const float* magnitudes, int64_t count, int32_t* maxima) {
  constexpr int kColumns = 4 * F32::kLanes;  // the columns that are processed at once, in registers
  static_assert(kTileColumns % kColumns == 0);
  for (int64_t tile = 0; tile < count; tile += kTile, maxima += kTileColumns) {
    for (int64_t first = 0; first < kTileColumns; first += kColumns) {
      const float* column = magnitudes + tile + first;
      int32_t greatest[kColumns] = {};
      for (int64_t row = 0; row < kGroup; ++row, column += kTileColumns)
        for (int i = 0; i < kColumns; ++i)
          greatest[i] = order(column[i]) > greatest[i] ? order(column[i]) : greatest[i];
      memcpy(maxima + first, greatest, sizeof greatest);
    }
  }
}

// Returns the number of values that are at least `least`.
template <class T>
DDPM_HD int64_t count_from(const T* values, int64_t count, int32_t least) {
  constexpr int64_t kPiece = 1 << 20;  // short enough for 32-bit counts
  int64_t total = 0;
  for (int64_t first = 0; first < count; first += kPiece) {
    const int length = static_cast<int>(count - first < kPiece ? count - first : kPiece);
    int in_piece = 0;
    for (int i = 0; i < length; ++i) in_piece += order(values[first + i]) >= least;
    total += in_piece;
  }
  return total;
}

// Returns the smallest value that is at least `least`. There must be such a value. For values below `least`, the
// unsigned difference wraps around and is large.
template <class T>
DDPM_HD int32_t smallest_from(const T* values, int64_t count, int32_t least) {
  uint32_t smallest = UINT32_MAX;
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t above = static_cast<uint32_t>(order(values[i])) - static_cast<uint32_t>(least);
    smallest = above < smallest ? above : smallest;
  }
  return least + static_cast<int32_t>(smallest);
}

// Returns the largest value, or 0 if there is none.
template <class T>
DDPM_HD int32_t largest(const T* values, int64_t count) {
  int32_t greatest = 0;
  for (int64_t i = 0; i < count; ++i) greatest = order(values[i]) > greatest ? order(values[i]) : greatest;
  return greatest;
}

// Returns the from_top-th largest value (1 is the largest), by bisection of its bits. The bisection ends early if
// exactly from_top values are at least the middle.
template <class T>
DDPM_HD int32_t select_one(const T* values, int64_t count, int64_t from_top) {
  int32_t low = smallest_from(values, count, 0), high = largest(values, count);
  while (low < high) {  // invariant: at least from_top values are >= low, and fewer than from_top are > high
    const int32_t middle = low + (high - low) / 2 + 1;
    const int64_t at_least_middle = count_from(values, count, middle);
    if (at_least_middle >= from_top)
      low = middle;
    else
      high = middle - 1;
    if (at_least_middle == from_top) break;
  }
  return smallest_from(values, count, low);
}

// Returns the from_top-th largest value and the next larger one, which is the same if values are equal or
// from_top is 1.
template <class T>
DDPM_HD Neighbours select_two(const T* values, int64_t count, int64_t from_top) {
  const int32_t below = select_one(values, count, from_top);
  const bool distinct = from_top > 1 && count_from(values, count, below + 1) == from_top - 1;
  const int32_t above = distinct ? smallest_from(values, count, below + 1) : below;
  return {static_cast<uint32_t>(below), static_cast<uint32_t>(above)};
}

// Returns the from_top-th largest magnitude and the next larger one, or NaN twice if a magnitude is NaN. If
// from_top is small, as for the quantile 0.995, few groups can contain one of the from_top largest magnitudes: those
// with a large maximum. Only these groups are searched.
Neighbours select(const float* magnitudes, const int32_t* maxima, int64_t count, int64_t from_top, int32_t* scratch) {
  const int64_t groups = count / kGroup;
  const int32_t greatest = largest(maxima, groups);
  if (greatest > static_cast<int32_t>(kInfiniteMagnitude))
    return {static_cast<uint32_t>(greatest), static_cast<uint32_t>(greatest)};  // NaN
  if (from_top > groups / 4) return select_two(magnitudes, count, from_top);
  // At least from_top magnitudes are at least the pivot, the from_top-th largest maximum. Larger magnitudes are in
  // fewer than from_top groups.
  const int32_t pivot = select_one(maxima, groups, from_top);
  int64_t above = 0;
  for (int64_t group = 0; group < groups; ++group) {
    if (maxima[group] <= pivot) continue;
    const float* column = magnitudes + group / kTileColumns * kTile + group % kTileColumns;
    for (int64_t row = 0; row < kGroup; ++row) {
      const int32_t value = order(column[row * kTileColumns]);
      scratch[above] = value;
      above += value > pivot;
    }
  }
  if (above >= from_top) return select_two(scratch, above, from_top);
  const int32_t next = above > 0 && above == from_top - 1 ? smallest_from(scratch, above, 0) : pivot;
  return {static_cast<uint32_t>(pivot), static_cast<uint32_t>(next)};
}

}  // namespace
}  // namespace ddpm_ext::DDPM_ISA
