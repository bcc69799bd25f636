// One element of a training loss: how far the model's output is from its target k0 x_start + k1 z, and the slope there.
#pragma once

#include "core/discretized.h"
#include "core/forward.h"

namespace ddpm_ext {

// As it lies in memory: float32 (rows, 4), the last unused.
struct alignas(16) LossRow {
  float k0, k1, weight;
  uint32_t unused;
};

enum class Loss : int { mse, l1, huber };

// x_start counts where it is there.
template <class Row, class F>
DDPM_HD F loss_difference(const Row& row, F m, bool has_x_start, F x_start, F z) {
  const F target = has_x_start ? affine({row.k0, row.k1}, x_start, z) : F(row.k1) * z;
  return fma(F(-1.0f), target, m);
}

// A loss of the difference d is s (d - c s), where s is d, or its sign, or d clamped to [-delta, delta]; c is 0, 0,
// 1/2.
template <class F>
DDPM_HD F loss_part(Loss kind, float delta, F d) {
  if (kind == Loss::mse) return d;
  if (kind == Loss::huber) return clamp(d, F(-delta), F(delta));
  return clamp(d * F(0x1p126f) * F(0x1p126f), F(-1.0f), F(1.0f));  // of subnormal numbers, too
}

template <class F>
DDPM_HD F loss_value(Loss kind, F d, F part) {
  return part * (kind == Loss::huber ? fma(part, F(-0.5f), d) : d);
}

// The slope is that of the part, times this.
DDPM_HD constexpr float slope_of_part(Loss kind) { return kind == Loss::mse ? 2.0f : 1.0f; }
DDPM_HD float slope_factor(float share, Loss kind, const LossRow& row) {
  return share * slope_of_part(kind) * row.weight;
}

// ------------------------------------------------------------------------------------- with the variational bound

// As it lies in memory: float32 (rows, 8). To `weight` times the loss comes `vlb_weight` times the bound's term, by the
// model's log-variance, l0 + l1 v, where v is its own output:
//   KL(posterior | model) = (e^g (1 + scale d^2) - 1 - g) / 2    g = -(l0 + l1 v): l0 has the posterior's taken off
//   at a decoder's row -ln of what the bin of x_start holds, whose mean is x_start + scale d
struct alignas(16) VariationalRow {
  float k0, k1, weight, vlb_weight, l0, l1, scale, decoder;
};

// The value, and its slopes by the model's output and by v.
template <class F>
struct LossParts {
  F value, slope, variance_slope;
};

// Nothing but the loss's own slope reaches the output where the mean is detached.
template <class F>
DDPM_HD LossParts<F> with_bound(const VariationalRow& row, Loss kind, float delta, bool detached, F d,
                                const LossParts<F>& bound) {
  const F part = loss_part(kind, delta, d), by_mean = F(detached ? 0.0f : row.vlb_weight) * bound.slope;
  return {fma(F(row.weight), loss_value(kind, d, part), F(row.vlb_weight) * bound.value),
          fma(F(row.weight * slope_of_part(kind)), part, by_mean), F(row.vlb_weight) * bound.variance_slope};
}

template <class F>
DDPM_HD LossParts<F> divergence(const VariationalRow& row, F d, F v) {
  const F g = clamp(fma(F(-row.l1), v, F(-row.l0)), F(-87.0f), F(88.0f));
  F exponential;
  const F excess = exponential_excess(g, exponential);
  const F slope = exponential * (F(row.scale) * d), moved = slope * d;
  return {F(0.5f) * (excess + moved), slope, F(-0.5f * row.l1) * (excess + g + moved)};
}

DDPM_HD LossParts<float> decoder_bound(const VariationalRow& row, float d, float v, float x_start) {
  const Unlikeliness bin = unlikeliness(x_start, -row.scale * d, fma(row.l1, v, row.l0));
  return {bin.value, row.scale * bin.by_mean, row.l1 * bin.by_log_variance};
}

// x_start is needed for the target, or for its bin.
DDPM_HD bool reads_x_start(const VariationalRow& row) { return row.k0 != 0.0f || row.decoder != 0.0f; }

DDPM_HD float slope_factor(float share, Loss, const VariationalRow&) { return share; }

// A sample's sum, in the same order on every device: elements by chunks of kLossChunk, of which element j is added to
// lane j mod kLossLanes in float32, and the lanes by halves in float64; then chunk i to strand i mod kLossStrands, and
// the strands by halves; and so the losses of a batch. What a sample's sum is multiplied by beside 1 / numel:
DDPM_HD float weight_of_sum(const LossRow& row) { return row.weight; }
DDPM_HD float weight_of_sum(const VariationalRow&) { return 1.0f; }
constexpr int kLossChunk = 512, kLossLanes = 64, kLossStrands = 128;

}  // namespace ddpm_ext
