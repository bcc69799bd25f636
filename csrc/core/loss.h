// One element of a training loss: how far the model's output is from its target k0 x_start + k1 z, and the slope there.
#pragma once

#include "core/forward.h"

namespace ddpm_ext {

// As it lies in memory: float32 (rows, 4), the last unused.
struct alignas(16) LossRow {
  float k0, k1, weight;
  uint32_t unused;
};

enum class Loss : int { mse, l1, huber };

// x_start counts where it is there.
template <class F>
DDPM_HD F loss_difference(const LossRow& row, F m, bool has_x_start, F x_start, F z) {
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

// What a part becomes the slope by. 16 bits hold neither a small share of a large batch nor every weight: there the
// slope is the part itself, and a backward pass multiplies it in float32.
template <class M>
DDPM_HD float slope_factor(float share, const LossRow& row) {
  return sizeof(M) == sizeof(float) ? share * row.weight : 1.0f;
}

// A sample's sum, in the same order on every device: elements by chunks of kLossChunk, of which element j is added to
// lane j mod kLossLanes in float32, and the lanes by halves in float64; then chunk i to strand i mod kLossStrands, and
// the strands by halves.
constexpr int kLossChunk = 512, kLossLanes = 64, kLossStrands = 128;

}  // namespace ddpm_ext
