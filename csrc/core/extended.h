// The reverse step with all that an affine row can't say. Of one element:
//   m    = u + w (m - u)                              classifier-free guidance, times a factor of the sample's
//   x0   = clamp(f (a x + b m)) + g0 g                f: a factor of the sample's; or of an x0 that is given
//   prev = c0 x0 + c1 x + c2 m + c3 h + V g1 g + S z  h: the x0 of the step before; g: a classifier's gradient
//   S, V = s, 1;  s exp(l0 + l1 v), exp(l0 + l1 v)^2;  or s sqrt(v), v     v: the model's own variance
//   prev = mask (k0 known + k1 z) + (1 - mask) prev   the part of the sample that is known
#pragma once

#include "core/exponential.h"
#include "core/forward.h"
#include "core/step.h"

namespace ddpm_ext {

// As it lies in memory: float32 (rows, 16).
struct alignas(16) ExtendedRow {
  StepRow step;
  float l0, l1, g0, g1, k0, k1, w;
  uint32_t unused;
};

// The tensors that a step reads besides x. Those of Role::x's dtype, then those of the model output's.
enum class Role : int { x, noise, x_start, history, gradient, known, mask, model_output, uncond, variance };
constexpr int kRoles = 10;
DDPM_HD constexpr bool of_model(Role role) { return role >= Role::model_output; }
// And those that it writes: the next sample, a second copy of it, x0.
enum class Result : int { prev, copy, x0 };
constexpr int kResults = 3;

enum class Variance : int { of_row, log, direct };

// What else all elements of a sample share.
struct ExtendedSample {
  float clip_min, clip_max, output_scale, x_start_scale;
  Variance variance;
};

DDPM_HD bool draws(const ExtendedRow& row, bool masked) { return row.step.s != 0.0f || (masked && row.k1 != 0.0f); }

template <class F>
DDPM_HD F guide(float w, F m, F u) {
  return fma(F(w), fma(F(-1.0f), u, m), u);
}

// A standard deviation, over the row's s; sqrt takes no 0.
template <class F>
DDPM_HD F learned_deviation(const ExtendedRow& row, Variance kind, F v) {
  if (kind == Variance::log) return exponential(fma(F(row.l1), v, F(row.l0)));
  return sqrt(clamp(v, F(0x1p-100f), F(0x1p100f)));
}

// N neighbours, so that what a call has is asked once for all of them. Io has(role), load<role>(i), has(result),
// store<result>(i, value): tensors that a call doesn't have are neither read nor written. z: their noise, where drawn.
template <int N, class F, class Io>
DDPM_HD void extended_step(const ExtendedRow& row, const ExtendedSample& sample, Io& io, bool drawn, F (&z)[N]) {
  const StepRow& step = row.step;
  const bool noisy = drawn || io.has(Role::noise), learned = sample.variance != Variance::of_row;
  F x[N], m[N], x0[N], prev[N];

#define DDPM_EACH DDPM_UNROLL for (int i = 0; i < N; ++i)
  DDPM_EACH x[i] = io.template load<Role::x>(i);
  DDPM_EACH m[i] = F(0.0f);
  if (io.has(Role::model_output)) {
    DDPM_EACH m[i] = io.template load<Role::model_output>(i);
  }
  if (io.has(Role::uncond) && row.w != 1.0f) {
    DDPM_EACH m[i] = guide(row.w, m[i], io.template load<Role::uncond>(i));
  }
  DDPM_EACH m[i] = m[i] * F(sample.output_scale);

  if (io.has(Role::x_start)) {
    DDPM_EACH x0[i] = io.template load<Role::x_start>(i);
  } else {
    DDPM_EACH x0[i] = fma(F(step.a), x[i], F(step.b) * m[i]);
  }
  DDPM_EACH x0[i] = clamp(x0[i] * F(sample.x_start_scale), F(sample.clip_min), F(sample.clip_max));

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
    DDPM_EACH deviation[i] = learned_deviation(row, sample.variance, io.template load<Role::variance>(i));
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
  // As in the plain step, noise that is given counts in every row.
  if (io.has(Role::noise) || (drawn && step.s != 0.0f)) {
    DDPM_EACH prev[i] = fma(deviation[i] * F(step.s), z[i], prev[i]);
  }
  if (io.has(Role::mask)) {
    DDPM_EACH {
      const F mask = io.template load<Role::mask>(i);
      const F known = io.template load<Role::known>(i);
      const F noised = noisy ? affine({row.k0, row.k1}, known, z[i]) : F(row.k0) * known;
      prev[i] = fma(mask, noised, fma(mask * F(-1.0f), prev[i], prev[i]));
    }
  }

  // Last, so that a result may lie where what it is made from does.
  if (io.has(Result::x0)) {
    DDPM_EACH io.template store<Result::x0>(i, x0[i]);
  }
  if (io.has(Result::copy)) {
    DDPM_EACH io.template store<Result::copy>(i, prev[i]);
  }
  DDPM_EACH io.template store<Result::prev>(i, prev[i]);
#undef DDPM_EACH
}

}  // namespace ddpm_ext
