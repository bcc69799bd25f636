// One element of the step with options: the reverse step (core/step.h) with guidance, a learned variance, a
// classifier's gradient, up to three history tensors, and inpainting.
//
// The docstring of ddpm_ext/tables/step_table.py has the equation. The letters here are the same: prev is the next
// sample, u is `uncond_output`, g is `gradient`, v is `model_variance` and H1 is `history1`. The step also takes these
// arguments (core/step_inputs.def):
// - `output_scale` multiplies the guided output m.
// - `x_start` replaces a x + b m. `x_start_scale` multiplies `x_start`, or a x + b m, before the clip.
// - `known` and `mask`: prev becomes mask (signal_after known + noise_after z) + (1 - mask) prev.
// - `model_input` becomes c_in prev.
// A term is left out if the call does not have its tensor.
#pragma once

#include "core/exponential.h"
#include "core/forward.h"
#include "core/step.h"
#include "core/step_inputs.h"

namespace ddpm_ext {

// Whether a step with this row needs the drawn noise, for the sample or, in a call with a mask (`masked`), for the
// known part. If not, the kernel skips the draw.
DDPM_HD bool draws_noise(const StepRow& row, bool masked) {
  return row.s != 0.0f || (masked && row.noise_after != 0.0f);
}

// The standard deviation divided by the row's s, from v, the model's output for the variance. The clamp keeps v
// in a range in which the GPU's sqrt (cuda/pair.cuh) is correctly rounded.
template <class F>
DDPM_HD F learned_deviation(const StepRow& row, Variance variance, F v) {
  if (variance == Variance::log) return exponential(fma(F(row.l1), v, F(row.l0)));
  return sqrt(clamp(v, F(0x1p-100f), F(0x1p100f)));
}

// Adds factor * values[i] to sums[i]. Does nothing for a factor of 0, since 0 times infinity would be NaN.
template <int N, class F>
DDPM_HD void add_values(float factor, const F (&values)[N], F (&sums)[N]) {
  if (factor == 0.0f) return;
  DDPM_UNROLL for (int i = 0; i < N; ++i) sums[i] = fma(F(factor), values[i], sums[i]);
}

// Like add_values, for the values of the tensor kRole. Does nothing if the call does not have this tensor.
template <Role kRole, int N, class F, class Io>
DDPM_HD void add_tensor(float factor, const Io& io, F (&sums)[N]) {
  if (!io.has(kRole) || factor == 0.0f) return;
  DDPM_UNROLL for (int i = 0; i < N; ++i) sums[i] = fma(F(factor), io.template load<kRole>(i), sums[i]);
}

// Takes the step for N neighbouring elements at once, so that each condition on the call is evaluated once for all of
// them. Io accesses memory: has(role) and has(result) say whether the call has a tensor, load<role>(i) reads element i,
// and store<result>(i, value) writes it. Tensors that the call does not have are neither read nor written. If `drawn`,
// z holds the elements' noise.
template <int N, class F, class Io>
DDPM_HD void take_step(const StepRow& row, const StepSample& sample, Io& io, bool drawn, F (&z)[N]) {
  const bool noisy = drawn || io.has(Role::noise);
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

  F deviation[N];
  DDPM_EACH deviation[i] = F(1.0f);
  if (sample.variance != Variance::of_row) {
    DDPM_EACH deviation[i] = learned_deviation(row, sample.variance, io.template load<Role::model_variance>(i));
  }
  if (io.has(Role::gradient)) {
    DDPM_EACH {
      const F gradient = io.template load<Role::gradient>(i);
      x0[i] = fma(F(row.g0), gradient, x0[i]);
      prev[i] = fma(deviation[i] * deviation[i] * F(row.g1), gradient, prev[i]);
    }
  }
  DDPM_EACH prev[i] = fma(F(row.c0), x0[i], prev[i]);

  if (io.has(Role::noise)) {
    DDPM_EACH z[i] = io.template load<Role::noise>(i);
  }
  // Noise from the caller is multiplied by s even if s is 0, so infinite noise gives NaN, as in the reverse step
  // without options. Only drawn noise, which is finite, is skipped.
  if (io.has(Role::noise) || (drawn && row.s != 0.0f)) {
    DDPM_EACH prev[i] = fma(deviation[i] * F(row.s), z[i], prev[i]);
  }
  if (io.has(Role::mask)) {
    DDPM_EACH {
      const F mask = io.template load<Role::mask>(i);
      const F known = io.template load<Role::known>(i);
      const F noised = noisy ? affine({row.signal_after, row.noise_after}, known, z[i]) : F(row.signal_after) * known;
      prev[i] = fma(mask, noised, fma(mask, F(-1.0f), F(1.0f)) * prev[i]);
    }
  }

  // Stores come last, so that a result may overwrite a tensor that it is computed from.
  if (io.has(Result::x0_out)) {
    DDPM_EACH io.template store<Result::x0_out>(i, x0[i]);
  }
  if (io.has(Result::history_out)) {
    F kept[N];
    // Without a term k1 x, the sum begins with -0: -0 + y is y for every number y, but 0 + y is 0 for y = -0.
    DDPM_EACH kept[i] = row.k1 != 0.0f ? F(row.k1) * x[i] : F(-0.0f);
    add_values(row.k2, m, kept);
    add_values(row.k0, x0, kept);
    DDPM_EACH io.template store<Result::history_out>(i, kept[i]);
  }
  if (io.has(Result::model_input)) {
    DDPM_EACH io.template store<Result::model_input>(i, F(row.c_in) * prev[i]);
  }
  DDPM_EACH io.template store<Result::out>(i, prev[i]);
#undef DDPM_EACH
}

}  // namespace ddpm_ext
