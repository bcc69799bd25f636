// Sums over the chunks of a run, for the kernels that reduce a sample.
#pragma once

namespace ddpm_ext::DDPM_ISA {
namespace {

// Makes the compiler store `values` to memory at this point and load them afterwards.
template <class T>
DDPM_HD void keep_in_memory(T& values) {
  asm("" : "+m"(values));
}

// Adds up a run's values, four vectors at a time, in the order that core/loss.h describes.
class ChunkSums {
 public:
  explicit ChunkSums(double* sums) : sums_(sums) { clear(); }

  // Adds the elements i to i + 4 F32::kLanes - 1 of the run. At the end of a chunk, writes the chunk's sum.
  DDPM_HD void add(int64_t i, const F32 (&values)[4]) {
    F32(&lanes)[4] = lanes_[i % kLossLanes / (4 * F32::kLanes)];
    for (int k = 0; k < 4; ++k) lanes[k] = lanes[k] + values[k];
    if ((i + 4 * F32::kLanes) % kLossChunk == 0) finish();
  }
  // Writes the sum of the values that were added since the last sum was written.
  DDPM_HD void finish() {
    float lanes[kLossLanes];
    for (int g = 0; g < kGroups; ++g)
      for (int k = 0; k < 4; ++k) store(lanes + (4 * g + k) * F32::kLanes, lanes_[g][k]);
    // Adds the lanes by halves. The sums go through memory, because otherwise the compiler would add single lanes
    // instead of vectors.
    double sums[kLossLanes / 2];
    for (int l = 0; l < kLossLanes / 2; ++l)
      sums[l] = static_cast<double>(lanes[l]) + static_cast<double>(lanes[l + kLossLanes / 2]);
    keep_in_memory(sums);
    for (int l = 0; l < 8; ++l) sums[l] = (sums[l] + sums[l + 16]) + (sums[l + 8] + sums[l + 24]);
    keep_in_memory(sums);
    for (int l = 0; l < 4; ++l) sums[l] += sums[l + 4];
    keep_in_memory(sums);
    *sums_++ = (sums[0] + sums[2]) + (sums[1] + sums[3]);
    clear();
  }

 private:
  static constexpr int kGroups = kLossLanes / (4 * F32::kLanes);

  DDPM_HD void clear() {
    for (int g = 0; g < kGroups; ++g)
      for (int k = 0; k < 4; ++k) lanes_[g][k] = F32(0.0f);
  }

  double* sums_;
  F32 lanes_[kGroups][4];
};

// Sets the elements of N vectors from index `valid` on to 0, since they are beyond the end of the sample.
template <int N>
DDPM_HD void zero_beyond(int64_t valid, F32 (&values)[N]) {
  if (valid >= N * F32::kLanes) return;
  float all[N * F32::kLanes];
  for (int k = 0; k < N; ++k) store(all + k * F32::kLanes, values[k]);
  for (int64_t j = valid > 0 ? valid : 0; j < N * F32::kLanes; ++j) all[j] = 0.0f;
  for (int k = 0; k < N; ++k) values[k] = load(all + k * F32::kLanes);
}

}  // namespace
}  // namespace ddpm_ext::DDPM_ISA
