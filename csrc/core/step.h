// A row of a step table, and one element of the reverse step: first x0, then the next sample. The docstring of
// ddpm_ext/tables/step_table.py has the equation; names here are its letters.
#pragma once

#include "core/forward.h"
#include "core/scalar.h"
#include "core/step_row.def"

namespace ddpm_ext {

#define DDPM_ROW_NUMBER(name) float name;
#define DDPM_ROW_BITS(name) uint32_t name;
#define DDPM_QUOTED(name) #name,

// A row of a step table in memory. The table is float32 (rows, kRowWidth); `draw` is an integer, stored
// as its bits. The reverse step uses only the first seven numbers, a to draw.
struct alignas(16) StepRow {
  DDPM_STEP_ROW(DDPM_ROW_NUMBER, DDPM_ROW_BITS)
  float unused[2];
};

constexpr const char* kRowNames[] = {DDPM_STEP_ROW(DDPM_QUOTED, DDPM_QUOTED)};
constexpr int kRowWidth = sizeof(StepRow) / sizeof(float);
static_assert(sizeof(kRowNames) / sizeof(kRowNames[0]) + sizeof(StepRow::unused) / sizeof(float) == kRowWidth);

#undef DDPM_ROW_NUMBER
#undef DDPM_ROW_BITS

// The predicted clean sample before it is clipped.
template <class F>
DDPM_HD F unclipped_x_start(float a, float b, F x, F m) {
  return affine({a, b}, x, m);
}

template <class F>
DDPM_HD F predict_x_start(const StepRow& row, F x, F m, float clip_min, float clip_max) {
  return clamp(unclipped_x_start(row.a, row.b, x, m), F(clip_min), F(clip_max));
}

// The next sample without its noise: c0 x0 + c1 x + c2 m. In most samplers c2 is 0, since the model's output m enters
// only through x0. Then the product c2 m is skipped: for an infinite m, the clip makes x0 finite, but 0 times m is NaN.
template <class F>
DDPM_HD F step_mean(const StepRow& row, F x, F m, float clip_min, float clip_max) {
  F other_terms = F(row.c1) * x;
  if (row.c2 != 0.0f) other_terms = fma(F(row.c2), m, other_terms);
  return fma(F(row.c0), predict_x_start(row, x, m, clip_min, clip_max), other_terms);
}

// Classifier-free guidance with the scale w (Ho & Salimans 2022, eq. 6, whose scale is w - 1). m is the model's output,
// and u its output without the condition.
template <class F>
DDPM_HD F guide(float w, F m, F u) {
  return fma(F(w), fma(F(-1.0f), u, m), u);
}

template <class F>
DDPM_HD F add_noise(const StepRow& row, F mean, F z) {
  return fma(F(row.s), z, mean);
}

}  // namespace ddpm_ext
