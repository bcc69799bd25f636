// The moments of the model's output and of the guided one, chunk by chunk (core/spread.h).
#pragma once

#include "cpu/kernels/sums.h"

namespace ddpm_ext::DDPM_ISA {
namespace {

template <class M>
void moments(const MomentsRun& run) {
  // Several chunks take each pass together, so that the sums of one are finished while the next one is added up.
  constexpr int64_t kStretch = 4 * kLossChunk;
  const float guidance = run.guidance;
  alignas(64) float guided[kStretch];
  for (int64_t first = 0; first < run.count; first += kStretch) {
    const M* m = static_cast<const M*>(run.model_output) + first;
    const M* u = static_cast<const M*>(run.uncond_output) + first;
    const int64_t count = run.count - first < kStretch ? run.count - first : kStretch;
    const int64_t valid = run.valid - first < kStretch ? run.valid - first : kStretch;
    // Adds up, for each chunk, what take(i, values) writes to values[0] for the model's output and to values[1] for the
    // guided one.
    const auto add_up = [&](double (&of_model)[kStretch / kLossChunk], double (&of_guided)[kStretch / kLossChunk],
                            auto take) __attribute__((always_inline)) {
      ChunkSums model_sums(of_model), guided_sums(of_guided);
      for (int64_t i = 0; i < count; i += 4 * F32::kLanes) {
        F32 values[2][4];
        for (int k = 0; k < 4; ++k) {
          F32 both[2];
          take(i + k * F32::kLanes, both);
          values[0][k] = both[0], values[1][k] = both[1];
        }
        zero_beyond(valid - i, values[0]);
        zero_beyond(valid - i, values[1]);
        model_sums.add(i, values[0]);
        guided_sums.add(i, values[1]);
      }
      if (count % kLossChunk != 0) model_sums.finish(), guided_sums.finish();
    };
    double sums[2][kStretch / kLossChunk], squares[2][kStretch / kLossChunk];
    add_up(sums[0], sums[1], [&](int64_t i, F32(&values)[2]) __attribute__((always_inline)) {
      values[0] = load(m + i);
      values[1] = guide(guidance, values[0], load(u + i));
      store(guided + i, values[1]);
    });
    float means[2][kStretch / kLossChunk];
    for (int k = 0; k < 2; ++k)
      for (int64_t c = 0; c * kLossChunk < count; ++c) means[k][c] = chunk_mean(sums[k][c], chunk_length(valid, c));
    add_up(squares[0], squares[1], [&](int64_t i, F32(&values)[2]) __attribute__((always_inline)) {
      values[0] = squared_difference(means[0][i / kLossChunk], load(m + i));
      values[1] = squared_difference(means[1][i / kLossChunk], load(guided + i));
    });
    for (int64_t c = 0; c * kLossChunk < count; ++c)
      for (int k = 0; k < 2; ++k) run.chunks[2 * (first / kLossChunk + c) + k] = {means[k][c], squares[k][c]};
  }
}

}  // namespace
}  // namespace ddpm_ext::DDPM_ISA
