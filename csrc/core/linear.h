// One element of the linear step, for samplers whose steps are linear in the sample, the model's output, the noise and
// up to three tensors that earlier steps kept:
//
//   m    = output_scale (u + w (m - u))
//   x0   = clip(x_start_scale (a x + b m)), where x_start, if there is one, is used in place of a x + b m
//   prev = c0 x0 + c1 x + c2 m + cu u + h1 history1 + h2 history2 + h3 history3 + s z
//   kept = k0 x0 + k1 x + k2 m, which is written to history_out
//
// u is `uncond_output`. The term of a tensor that the call does not have (core/linear.def) is left out.
#pragma once

#include "core/linear.def"
#include "core/options.h"
#include "core/step.h"

namespace ddpm_ext {

// A row as it lies in memory: float32 (rows, 16).
struct alignas(16) LinearRow {
  float a, b, c0, c1, c2, s;
  uint32_t draw;
  float cu, h1, h2, h3, k0, k1, k2, w;
  uint32_t unused;
};

struct LinearStep {
  using Row = LinearRow;
  struct Settings {};
  DDPM_STEP_TYPES(DDPM_LINEAR)

  static DDPM_HD uint32_t draw(const Row& row) { return row.draw; }

  // Whether a step of this row needs noise that the kernel draws.
  template <class Call>
  static DDPM_HD bool draws(const Row& row, const Call&) {
    return row.s != 0.0f;
  }
};

// Adds a term to each sum. A factor of 0 leaves the values out, since 0 times infinity would be NaN.
template <int N, class F>
DDPM_HD void add_values(float factor, const F (&values)[N], F (&sums)[N]) {
  if (factor == 0.0f) return;
  DDPM_UNROLL for (int i = 0; i < N; ++i) sums[i] = fma(F(factor), values[i], sums[i]);
}

// The same with the values of a tensor, if the call has it.
template <auto kRole, int N, class F, class Io>
DDPM_HD void add_tensor(float factor, const Io& io, F (&sums)[N]) {
  if (!io.has(kRole) || factor == 0.0f) return;
  DDPM_UNROLL for (int i = 0; i < N; ++i) sums[i] = fma(F(factor), io.template load<kRole>(i), sums[i]);
}

// Takes the step for N neighbouring elements at once, as the extended step's function of this name does, and with the
// same operations in the same order, so that a row without history gives the bits of the extended step.
template <int N, class F, class Io>
DDPM_HD void take_step(const LinearRow& row, const StepSample<LinearStep>& sample, Io& io, bool drawn, F (&z)[N]) {
  using Role = LinearStep::Role;
  using Result = LinearStep::Result;
  using Factor = LinearStep::Factor;
  F x[N], m[N], x0[N], prev[N];

#define DDPM_EACH DDPM_UNROLL for (int i = 0; i < N; ++i)
  DDPM_EACH x[i] = io.template load<Role::x_t>(i);
  DDPM_EACH m[i] = F(0.0f);
  if (io.has(Role::model_output)) {
    DDPM_EACH m[i] = io.template load<Role::model_output>(i);
  }
  if (io.has(Role::uncond_output) && row.w != 1.0f) {
    DDPM_EACH m[i] = guide(row.w, m[i], io.template load<Role::uncond_output>(i));
  }
  DDPM_EACH m[i] = m[i] * F(sample[Factor::output_scale]);

  if (io.has(Role::x_start)) {
    DDPM_EACH x0[i] = io.template load<Role::x_start>(i);
  } else {
    DDPM_EACH x0[i] = unclipped_x_start(row.a, row.b, x[i], m[i]);
  }
  DDPM_EACH x0[i] = clamp(x0[i] * F(sample[Factor::x_start_scale]), F(sample.clip_min), F(sample.clip_max));

  DDPM_EACH prev[i] = F(row.c1) * x[i];
  add_values(row.c2, m, prev);
  add_tensor<Role::uncond_output>(row.cu, io, prev);
  add_tensor<Role::history1>(row.h1, io, prev);
  add_tensor<Role::history2>(row.h2, io, prev);
  add_tensor<Role::history3>(row.h3, io, prev);
  DDPM_EACH prev[i] = fma(F(row.c0), x0[i], prev[i]);

  if (io.has(Role::noise)) {
    DDPM_EACH z[i] = io.template load<Role::noise>(i);
  }
  // As in the plain step, given noise is added in every row, also where s is 0.
  if (io.has(Role::noise) || drawn) {
    DDPM_EACH prev[i] = fma(F(row.s), z[i], prev[i]);
  }

  // Stores come last, so that a result may overwrite the tensors that it is computed from.
  if (io.has(Result::history_out)) {
    F kept[N];
    // -0 is the sum of nothing: adding a number to it gives that number, also 0 and -0.
    DDPM_EACH kept[i] = row.k1 != 0.0f ? F(row.k1) * x[i] : F(-0.0f);
    add_values(row.k2, m, kept);
    add_values(row.k0, x0, kept);
    DDPM_EACH io.template store<Result::history_out>(i, kept[i]);
  }
  if (io.has(Result::x0_out)) {
    DDPM_EACH io.template store<Result::x0_out>(i, x0[i]);
  }
  if (io.has(Result::out_copy)) {
    DDPM_EACH io.template store<Result::out_copy>(i, prev[i]);
  }
  DDPM_EACH io.template store<Result::out>(i, prev[i]);
#undef DDPM_EACH
}

}  // namespace ddpm_ext
