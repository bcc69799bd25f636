// One element of the extended step, which is the reverse step (core/step.h) with everything that its row cannot
// express.
//
// The equation stands in the docstring of ddpm_ext's StepTable, with the same letters: g is `gradient`, h is `history`
// and v is `model_variance`. The extended step also takes these arguments (core/extras.def):
// - `uncond_output` u: m becomes u + w (m - u), which is classifier-free guidance, before `output_scale` multiplies it.
// - `x_start` is used in place of a x + b m, and `x_start_scale` multiplies either before the clip.
// - `known` and `mask`: prev becomes mask (k0 known + k1 z) + (1 - mask) prev.
#pragma once

#include "core/exponential.h"
#include "core/extras.def"
#include "core/forward.h"
#include "core/options.h"
#include "core/step.h"

namespace ddpm_ext {

// A row as it lies in memory: float32 (rows, 16).
struct alignas(16) ExtendedRow {
  StepRow step;
  float l0, l1, g0, g1, k0, k1, w;
  uint32_t unused;
};

// Where the standard deviation comes from: from the row alone, or from model_variance as a logarithm or as it is.
enum class Variance : int { of_row, log, direct };

struct ExtendedStep {
  using Row = ExtendedRow;
  struct Settings {
    Variance variance = Variance::of_row;
  };
  DDPM_STEP_TYPES(DDPM_EXTRAS)

  static DDPM_HD uint32_t draw(const Row& row) { return row.step.draw; }

  // Whether a step of this row needs noise that the kernel draws.
  template <class Call>
  static DDPM_HD bool draws(const Row& row, const Call& call) {
    return row.step.s != 0.0f || (call[Role::mask].data != nullptr && row.k1 != 0.0f);
  }
};

// The standard deviation divided by the row's s. The clamp keeps zero away from sqrt, which does not take it.
template <class F>
DDPM_HD F learned_deviation(const ExtendedRow& row, Variance kind, F v) {
  if (kind == Variance::log) return exponential(fma(F(row.l1), v, F(row.l0)));
  return sqrt(clamp(v, F(0x1p-100f), F(0x1p100f)));
}

// Takes the step for N neighbouring elements at once, so that each question about the call is answered once for all of
// them. Io reads and writes memory: has(role) and has(result) say whether the call has a tensor, load<role>(i) reads
// element i, and store<result>(i, value) writes it. Tensors that the call does not have are neither read nor written.
// z holds the elements' noise if `drawn`.
template <int N, class F, class Io>
DDPM_HD void take_step(const ExtendedRow& row, const StepSample<ExtendedStep>& sample, Io& io, bool drawn, F (&z)[N]) {
  using Role = ExtendedStep::Role;
  using Result = ExtendedStep::Result;
  using Factor = ExtendedStep::Factor;
  const StepRow& step = row.step;
  const bool noisy = drawn || io.has(Role::noise);
  const Variance variance = sample.settings.variance;
  const bool learned = variance != Variance::of_row;
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
    DDPM_EACH x0[i] = unclipped_x_start(step.a, step.b, x[i], m[i]);
  }
  DDPM_EACH x0[i] = clamp(x0[i] * F(sample[Factor::x_start_scale]), F(sample.clip_min), F(sample.clip_max));

  DDPM_EACH prev[i] = F(step.c1) * x[i];
  if (step.c2 != 0.0f) {
    DDPM_EACH prev[i] = fma(F(step.c2), m[i], prev[i]);
  }
  if (io.has(Role::history) && step.c3 != 0.0f) {
    DDPM_EACH prev[i] = fma(F(step.c3), io.template load<Role::history>(i), prev[i]);
  }

  F deviation[N];
  DDPM_EACH deviation[i] = F(1.0f);
  if (learned) {
    DDPM_EACH deviation[i] = learned_deviation(row, variance, io.template load<Role::model_variance>(i));
  }
  if (io.has(Role::gradient)) {
    DDPM_EACH {
      const F gradient = io.template load<Role::gradient>(i);
      x0[i] = fma(F(row.g0), gradient, x0[i]);
      prev[i] = fma(deviation[i] * deviation[i] * F(row.g1), gradient, prev[i]);
    }
  }
  DDPM_EACH prev[i] = fma(F(step.c0), x0[i], prev[i]);

  if (io.has(Role::noise)) {
    DDPM_EACH z[i] = io.template load<Role::noise>(i);
  }
  // As in the plain step, given noise is added in every row, also where s is 0.
  if (io.has(Role::noise) || (drawn && step.s != 0.0f)) {
    DDPM_EACH prev[i] = fma(deviation[i] * F(step.s), z[i], prev[i]);
  }
  if (io.has(Role::mask)) {
    DDPM_EACH {
      const F mask = io.template load<Role::mask>(i);
      const F known = io.template load<Role::known>(i);
      const F noised = noisy ? affine({row.k0, row.k1}, known, z[i]) : F(row.k0) * known;
      prev[i] = fma(mask, noised, fma(mask, F(-1.0f), F(1.0f)) * prev[i]);
    }
  }

  // Stores come last, so that a result may overwrite the tensors that it is computed from.
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
