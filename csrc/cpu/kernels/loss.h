// The kernel of the training loss: the loop over a run.
#pragma once

#include "cpu/kernels/normals.h"
#include "cpu/kernels/sums.h"

namespace ddpm_ext::DDPM_ISA {
namespace {

// Returns decoder_bound of core/loss.h for a vector, computed lane by lane.
DDPM_HD LossAndSlopes<F32> decoder_bound(const VariationalRow& row, F32 d, F32 v, F32 x_start) {
  float ds[F32::kLanes], vs[F32::kLanes], xs[F32::kLanes], values[F32::kLanes], slopes[F32::kLanes];
  float variance_slopes[F32::kLanes];
  store(ds, d), store(vs, v), store(xs, x_start);
  for (int i = 0; i < F32::kLanes; ++i) {
    const LossAndSlopes<float> bound = ddpm_ext::decoder_bound(row, ds[i], vs[i], xs[i]);
    values[i] = bound.value, slopes[i] = bound.slope, variance_slopes[i] = bound.variance_slope;
  }
  return {load(values), load(slopes), load(variance_slopes)};
}

// Computes the losses of a run, their slopes, and the sums of the run's chunks.
template <class Row, Noise kNoise, class X, class M>
void loss_of_run(const LossRun& run) {
  constexpr bool kVariational = std::is_same_v<Row, VariationalRow>;
  const Row row = *static_cast<const Row*>(run.row);
  const M* m = static_cast<const M*>(run.model_output);
  const M* variance = static_cast<const M*>(run.variance);
  const X* x_start = static_cast<const X*>(run.x_start);
  const X* noise = static_cast<const X*>(run.noise);
  float* slope = static_cast<float*>(run.slope);
  float* variance_slope = static_cast<float*>(run.variance_slope);
  const Loss kind = run.kind;
  const float factor = slope_factor(run.slope_share, kind, row), delta = run.delta;
  const bool detached = run.detached;
  const int64_t valid = run.valid;
  bool aimed_at_x_start = x_start != nullptr;
  if constexpr (kVariational) {
    if (!reads_x_start(row)) x_start = nullptr;
    aimed_at_x_start = row.k0 != 0.0f;
  }
  ChunkSums sums(run.chunks);
  for_each_four<kNoise>(run, [&](int64_t i, F32(&z)[4]) {
    F32 values[4];
    for (int k = 0; k < 4; ++k) {
      const int64_t offset = i + k * F32::kLanes;
      if constexpr (kNoise == Noise::given) z[k] = load(noise + offset);
      if constexpr (kNoise == Noise::none) z[k] = F32(0.0f);
      const F32 x = x_start != nullptr ? load(x_start + offset) : F32(0.0f);
      const F32 d = loss_difference(row, load(m + offset), aimed_at_x_start, x, z[k]);
      if constexpr (kVariational) {
        const F32 v = variance != nullptr ? load(variance + offset) : F32(0.0f);
        const LossAndSlopes<F32> parts =
            with_bound(row, kind, delta, detached, d,
                       row.decoder != 0.0f ? DDPM_ISA::decoder_bound(row, d, v, x) : divergence(row, d, v));
        values[k] = parts.value;
        if (slope != nullptr) store(slope + offset, F32(factor) * parts.slope);
        if (variance_slope != nullptr) store(variance_slope + offset, F32(factor) * parts.variance_slope);
      } else {
        const F32 s = unscaled_slope(kind, delta, d);
        values[k] = loss_value(kind, d, s);
        if (slope != nullptr) store(slope + offset, F32(factor) * s);
      }
    }
    zero_beyond(valid - i, values);
    sums.add(i, values);
  });
  if (run.count % kLossChunk != 0) sums.finish();
}

}  // namespace
}  // namespace ddpm_ext::DDPM_ISA
