// One element of the reverse process:
//   x0   = clamp(a x + b m)
//   prev = c0 x0 + c1 x + c2 m + s z
#pragma once

#include "core/scalar.h"

namespace ddpm_ext {

// A row of a step table as it lies in memory: float32 (rows, 8), the seventh column an int32's bits, the last read by
// the extended step alone.
struct alignas(16) StepRow {
  float a, b, c0, c1, c2, s;
  uint32_t draw;
  float c3;
};

template <class F>
DDPM_HD F predict_x_start(const StepRow& row, F x, F m, float clip_min, float clip_max) {
  return clamp(fma(F(row.a), x, F(row.b) * m), F(clip_min), F(clip_max));
}

// The noise-free part. c2 is 0 but for samplers that keep the model's eps, and 0 times an infinite m would be NaN where
// the clip had tamed it.
template <class F>
DDPM_HD F step_mean(const StepRow& row, F x, F m, float clip_min, float clip_max) {
  F rest = F(row.c1) * x;
  if (row.c2 != 0.0f) rest = fma(F(row.c2), m, rest);
  return fma(F(row.c0), predict_x_start(row, x, m, clip_min, clip_max), rest);
}

template <class F>
DDPM_HD F add_noise(const StepRow& row, F mean, F z) {
  return fma(F(row.s), z, mean);
}

}  // namespace ddpm_ext
