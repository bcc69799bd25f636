// The kernel of rescaled guidance: computes the moments of the model's output and of the guided output, for each chunk
// (core/spread.h).
#pragma once

#include "cpu/kernels/sums.h"

namespace ddpm_ext::DDPM_ISA {
namespace {

constexpr int kSpreadVectors = kSpreadLanes / F32::kLanes;
// The number of vectors of lanes that are added up at once. It is small enough for their sums to stay in registers.
constexpr int kPassVectors = F32::kLanes < 8 ? 4 : 2;

// The lanes' moments of one chunk, for one of the two outputs.
struct Spread {
  LaneMoments<F32> lanes[kSpreadVectors];
};

// Returns the sum of all lanes. value(k) returns vector k of the lanes, for k from 0 to kSpreadVectors - 1.
template <class Value>
DDPM_HD double sum_of_lanes(Value value) {
  constexpr int kHalf = kSpreadLanes / 2;
  float lanes[kHalf];
  for (int k = 0; k < kSpreadVectors / 2; ++k) store(lanes + k * F32::kLanes, value(k) + value(k + kSpreadVectors / 2));
  double sums[kHalf / 2];
  for (int l = 0; l < kHalf / 2; ++l)
    sums[l] = static_cast<double>(lanes[l]) + static_cast<double>(lanes[l + kHalf / 2]);
  for (int h = kHalf / 4; h > 0; h /= 2)
    for (int l = 0; l < h; ++l) sums[l] += sums[l + h];
  return sums[0];
}

// Computes the lanes' moments of a chunk of `length` elements, for both outputs. kWhole says that the chunk is
// complete. The memory of an incomplete chunk extends to a multiple of kSpreadLanes elements.
template <bool kWhole, class M>
DDPM_HD void add_up_chunk(const M* m, const M* u, float guidance, int64_t length, Spread& of_model, Spread& of_guided) {
  for (int first = 0; first < kSpreadVectors; first += kPassVectors) {
    // Calls take(values, valid) with the values of both outputs from element i on. Only the first `valid` values belong
    // to the sample.
    const auto with_values = [=](int64_t i, auto take) __attribute__((always_inline)) {
      F32 values[2][kPassVectors];
      for (int k = 0; k < kPassVectors; ++k) {
        values[0][k] = load(m + i + k * F32::kLanes);
        values[1][k] = guide(guidance, values[0][k], load(u + i + k * F32::kLanes));
      }
      take(values, length - i);
    };
    const int64_t begin = first * F32::kLanes;
    LaneMoments<F32> moments[2][kPassVectors];
    with_values(begin, [&](F32(&values)[2][kPassVectors], int64_t valid) __attribute__((always_inline)) {
      for (int o = 0; o < 2; ++o) {
        if constexpr (!kWhole) zero_beyond(valid, values[o]);
        for (int k = 0; k < kPassVectors; ++k) moments[o][k].begin(values[o][k]);
      }
    });
    for (int64_t i = begin + kSpreadLanes; i < (kWhole ? kLossChunk : length); i += kSpreadLanes)
      with_values(i, [&](F32(&values)[2][kPassVectors], int64_t valid) __attribute__((always_inline)) {
        for (int o = 0; o < 2; ++o) {
          for (int k = 0; k < kPassVectors; ++k) values[o][k] = moments[o][k].difference(values[o][k]);
          if constexpr (!kWhole) zero_beyond(valid, values[o]);
          for (int k = 0; k < kPassVectors; ++k) moments[o][k].add(values[o][k]);
        }
      });
    for (int k = 0; k < kPassVectors; ++k)
      of_model.lanes[first + k] = moments[0][k], of_guided.lanes[first + k] = moments[1][k];
  }
}

// Stores the moments of the run's chunks.
template <class M>
void moments(const MomentsRun& run) {
  constexpr int64_t kChunks = 4;  // processed at once, so that the CPU computes their final sums in parallel
  const M* const m = static_cast<const M*>(run.model_output);
  const M* const u = static_cast<const M*>(run.uncond_output);
  const int64_t chunks = (run.valid + kLossChunk - 1) / kLossChunk;
  for (int64_t begin = 0; begin < chunks; begin += kChunks) {
    const int64_t count = chunks - begin < kChunks ? chunks - begin : kChunks;
    Spread outputs[2 * kChunks];  // for each chunk: of the model's output, of the guided output
    F32 n[kSpreadVectors];        // the number of elements in each lane
    for (F32& lanes : n) lanes = F32(static_cast<float>(kLossChunk / kSpreadLanes));
    for (int64_t c = 0; c < count; ++c) {
      const int64_t first = (begin + c) * kLossChunk, length = chunk_length(run.valid, begin + c);
      if (length == kLossChunk) {
        add_up_chunk<true>(m + first, u + first, run.guidance, length, outputs[2 * c], outputs[2 * c + 1]);
        continue;
      }
      // An incomplete chunk is always the only chunk of its run.
      add_up_chunk<false>(m + first, u + first, run.guidance, length, outputs[2 * c], outputs[2 * c + 1]);
      float lengths[kSpreadLanes];
      for (int l = 0; l < kSpreadLanes; ++l) lengths[l] = static_cast<float>(lane_length(length, l));
      for (int k = 0; k < kSpreadVectors; ++k) n[k] = load(lengths + k * F32::kLanes);
    }
    double sums[2 * kChunks], squares[2 * kChunks];
    float means[2 * kChunks];
    for (int64_t i = 0; i < 2 * count; ++i)
      sums[i] = sum_of_lanes([&](int k) { return outputs[i].lanes[k].total(n[k]); });
    for (int64_t i = 0; i < 2 * count; ++i) means[i] = chunk_mean(sums[i], chunk_length(run.valid, begin + i / 2));
    for (int64_t i = 0; i < 2 * count; ++i)
      squares[i] = sum_of_lanes([&](int k) { return outputs[i].lanes[k].squares_from(F32(means[i]), n[k]); });
    for (int64_t i = 0; i < 2 * count; ++i) run.chunks[2 * begin + i] = {means[i], squares[i]};
  }
}

}  // namespace
}  // namespace ddpm_ext::DDPM_ISA
