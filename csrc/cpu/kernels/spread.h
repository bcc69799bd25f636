// The moments of the model's output and of the guided one, chunk by chunk (core/spread.h).
#pragma once

#include "cpu/kernels/sums.h"

namespace ddpm_ext::DDPM_ISA {
namespace {

template <class M>
void moments(const MomentsRun& run) {
  const float guidance = run.guidance;
  alignas(64) float guided[kLossChunk];
  for (int64_t first = 0; first < run.count; first += kLossChunk) {
    const M* m = static_cast<const M*>(run.model_output) + first;
    const M* u = static_cast<const M*>(run.uncond_output) + first;
    const int64_t count = run.count - first < kLossChunk ? run.count - first : kLossChunk;
    const int64_t valid = run.valid - first < kLossChunk ? run.valid - first : kLossChunk;
    // Adds up what take(at, values) writes to values[0] for the model's output and to values[1] for the guided one.
    const auto add_up = [&](double (&sums)[2], auto take) __attribute__((always_inline)) {
      ChunkSums of_model(sums), of_guided(sums + 1);
      for (int64_t i = 0; i < count; i += 4 * F32::kLanes) {
        F32 values[2][4];
        for (int k = 0; k < 4; ++k) {
          F32 both[2];
          take(i + k * F32::kLanes, both);
          values[0][k] = both[0], values[1][k] = both[1];
        }
        zero_beyond(valid - i, values[0]);
        zero_beyond(valid - i, values[1]);
        of_model.add(i, values[0]);
        of_guided.add(i, values[1]);
      }
      if (count % kLossChunk != 0) of_model.finish(), of_guided.finish();
    };
    double sums[2], squares[2];
    add_up(sums, [&](int64_t at, F32(&values)[2]) __attribute__((always_inline)) {
      values[0] = load(m + at);
      values[1] = guide(guidance, values[0], load(u + at));
      store(guided + at, values[1]);
    });
    const float means[2] = {chunk_mean(sums[0], valid), chunk_mean(sums[1], valid)};
    add_up(squares, [&](int64_t at, F32(&values)[2]) __attribute__((always_inline)) {
      values[0] = squared_difference(means[0], load(m + at));
      values[1] = squared_difference(means[1], load(guided + at));
    });
    for (int k = 0; k < 2; ++k) run.chunks[2 * (first / kLossChunk) + k] = {means[k], squares[k]};
  }
}

}  // namespace
}  // namespace ddpm_ext::DDPM_ISA
