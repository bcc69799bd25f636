// One element of the reverse step: x0 and then the next sample, by one row. The equation stands in the docstring of
// ddpm_ext's StepTable; names here are its letters.
#pragma once

#include "core/scalar.h"

namespace ddpm_ext {

// A row of a step table as it lies in memory: float32 (rows, 8). The seventh column holds the bits of an integer, and
// only the extended step reads the last one.
struct alignas(16) StepRow {
  float a, b, c0, c1, c2, s;
  uint32_t draw;
  float c3;
};

// The clean sample before it is clipped.
template <class F>
DDPM_HD F unclipped_x_start(float a, float b, F x, F m) {
  return fma(F(a), x, F(b) * m);
}

template <class F>
DDPM_HD F predict_x_start(const StepRow& row, F x, F m, float clip_min, float clip_max) {
  return clamp(unclipped_x_start(row.a, row.b, x, m), F(clip_min), F(clip_max));
}

// The step without its noise. Only samplers that keep the model's own eps have a c2 other than 0. For the others m must
// not be read a second time: 0 times an infinite m would be NaN, although the clip has made x0 finite.
template <class F>
DDPM_HD F step_mean(const StepRow& row, F x, F m, float clip_min, float clip_max) {
  F rest = F(row.c1) * x;
  if (row.c2 != 0.0f) rest = fma(F(row.c2), m, rest);
  return fma(F(row.c0), predict_x_start(row, x, m, clip_min, clip_max), rest);
}

// Classifier-free guidance with the scale w (Ho & Salimans 2022, eq. 6, whose scale is w - 1).
template <class F>
DDPM_HD F guide(float w, F m, F u) {
  return fma(F(w), fma(F(-1.0f), u, m), u);
}

template <class F>
DDPM_HD F add_noise(const StepRow& row, F mean, F z) {
  return fma(F(row.s), z, mean);
}

}  // namespace ddpm_ext
