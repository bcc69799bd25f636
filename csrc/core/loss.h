// One element of a training loss: the difference between the model's output and its target k0 x_start + k1 z, the loss
// of that difference, and the derivative ("slope") of the loss.
#pragma once

#include "core/discretized.h"
#include "core/forward.h"

namespace ddpm_ext {

// A row of the loss table in memory: float32 (rows, 4). The last column is unused.
struct alignas(16) LossRow {
  float k0, k1, weight;
  uint32_t unused;
};

enum class Loss : int { mse, l1, huber };

// The model's output minus its target. Without x_start the target is k1 z.
template <class Row, class F>
DDPM_HD F loss_difference(const Row& row, F m, bool has_x_start, F x_start, F z) {
  const F target = has_x_start ? affine({row.k0, row.k1}, x_start, z) : F(row.k1) * z;
  return fma(F(-1.0f), target, m);
}

// Returns s, the loss's derivative by the difference d without the constant factor slope_scale(kind). For mse, s is d;
// for l1, the sign of d; for huber, d clamped to [-delta, delta].
template <class F>
DDPM_HD F unscaled_slope(Loss kind, float delta, F d) {
  if (kind == Loss::mse) return d;
  if (kind == Loss::huber) return clamp(d, F(-delta), F(delta));
  return clamp(d * F(0x1p126f) * F(0x1p126f), F(-1.0f), F(1.0f));  // the sign, of subnormal numbers too
}

// Returns the loss of the difference d, where s is unscaled_slope of d: s d, or s (d - s / 2) for huber.
template <class F>
DDPM_HD F loss_value(Loss kind, F d, F s) {
  return s * (kind == Loss::huber ? fma(s, F(-0.5f), d) : d);
}

// The derivative of the loss by the difference is this factor times unscaled_slope.
DDPM_HD constexpr float slope_scale(Loss kind) { return kind == Loss::mse ? 2.0f : 1.0f; }

// The factor from unscaled_slope to the slope that a call returns. `share` is one element's share in the returned loss:
// 1 / numel, or 1 / (batch numel) for the mean over a batch.
DDPM_HD float slope_factor(float share, Loss kind, const LossRow& row) {
  return share * slope_scale(kind) * row.weight;
}

// ------------------------------------------------------------------------------------- with the variational bound

// A row of the table for a loss with the variational bound: float32 (rows, 8). The loss is `weight` times
// loss_value(d) plus `vlb_weight` times a term of the variational bound. d is loss_difference, the model's output minus
// its target. The model's log-variance is l0 + l1 v, where v is the model's output for the variance.
//
// In a row with decoder = 0 the term is the KL divergence of the posterior from the model. There l0 is relative to the
// posterior's log-variance:
//   KL(posterior | model) = (e^g (1 + scale d^2) - 1 - g) / 2        g = -(l0 + l1 v), clamped to [-87, 88]
// The derivative by v ignores the clamp: it is not 0 where g is clamped.
// In a row with decoder != 0 the term is -ln of the probability of x_start's 8-bit level (core/discretized.h),
// under a Gaussian whose mean is x_start + scale d.
struct alignas(16) VariationalRow {
  float k0, k1, weight, vlb_weight, l0, l1, scale, decoder;
};

// A loss and its derivatives by the model's output and by v, the model's output for the variance.
template <class F>
struct LossAndSlopes {
  F value, slope, variance_slope;
};

// Returns the weighted sum of the loss of the difference d and of `bound`, a term of the variational bound, with its
// derivatives. If the mean is detached, the bound adds nothing to the derivative by the model's output.
template <class F>
DDPM_HD LossAndSlopes<F> with_bound(const VariationalRow& row, Loss kind, float delta, bool detached, F d,
                                    const LossAndSlopes<F>& bound) {
  const F s = unscaled_slope(kind, delta, d), by_mean = F(detached ? 0.0f : row.vlb_weight) * bound.slope;
  return {fma(F(row.weight), loss_value(kind, d, s), F(row.vlb_weight) * bound.value),
          fma(F(row.weight * slope_scale(kind)), s, by_mean), F(row.vlb_weight) * bound.variance_slope};
}

// The bound's term in a row with decoder = 0: the KL divergence, with its derivatives.
template <class F>
DDPM_HD LossAndSlopes<F> divergence(const VariationalRow& row, F d, F v) {
  const F g = clamp(fma(F(-row.l1), v, F(-row.l0)), F(-87.0f), F(88.0f));
  F exponential;
  const F excess = exponential_excess(g, exponential);
  const F slope = exponential * (F(row.scale) * d), moved = slope * d;
  return {F(0.5f) * (excess + moved), slope, F(-0.5f * row.l1) * (excess + g + moved)};
}

// The bound's term in a row with decoder != 0: -ln of the probability of x_start's 8-bit level.
DDPM_HD LossAndSlopes<float> decoder_bound(const VariationalRow& row, float d, float v, float x_start) {
  const Unlikeliness bin = unlikeliness(x_start, -row.scale * d, fma(row.l1, v, row.l0));
  return {bin.value, row.scale * bin.by_mean, row.l1 * bin.by_log_variance};
}

// Whether a row needs x_start, for the target or for the decoder's term.
DDPM_HD bool reads_x_start(const VariationalRow& row) { return row.k0 != 0.0f || row.decoder != 0.0f; }

// with_bound has already applied the row's weights to the slopes.
DDPM_HD float slope_factor(float share, Loss, const VariationalRow&) { return share; }

// A sample's loss is the sum over its elements times 1 / numel times this factor. with_bound has already applied the
// weights of a VariationalRow to the elements.
DDPM_HD float weight_of_sum(const LossRow& row) { return row.weight; }
DDPM_HD float weight_of_sum(const VariationalRow&) { return 1.0f; }

// Every device adds up a sample's losses in the same order:
// - A sample is cut into chunks of kLossChunk neighbouring elements. In a chunk, lane l is the float32 sum of the
//   elements j with j mod kLossLanes = l.
// - A chunk's lanes are added by halves, in float64: lane l + n/2 of n lanes is added to lane l, then n is halved.
// - Strand s is the float64 sum of the chunks i with i mod kLossStrands = s. The strands are added by halves, too.
// The sum of a batch's losses is taken in strands as well.
constexpr int kLossChunk = 512, kLossLanes = 64, kLossStrands = 128;

}  // namespace ddpm_ext
