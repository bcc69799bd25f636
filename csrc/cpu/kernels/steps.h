// The kernels of the reverse step, of the affine operators and of randn: their loops over a run.
#pragma once

#include "cpu/kernels/normals.h"

namespace ddpm_ext::DDPM_ISA {
namespace {

template <Noise kNoise, class X, class M>
void reverse_step(const Run& run) {
  const StepRow row = *static_cast<const StepRow*>(run.row);
  const X* x = static_cast<const X*>(run.x);
  const M* m = static_cast<const M*>(run.model_output);
  const X* noise = static_cast<const X*>(run.noise);
  X* out = static_cast<X*>(run.out);
  const float clip_min = run.clip_min, clip_max = run.clip_max;
  for_each_vector<kNoise>(run, [=](int64_t i, F32 z) {
    F32 y = step_mean(row, load(x + i), load(m + i), clip_min, clip_max);
    if constexpr (kNoise == Noise::given) z = load(noise + i);
    if constexpr (kNoise != Noise::none) y = add_noise(row, y, z);
    store(out + i, y);
  });
}

template <Noise kNoise, class X, class Z>
void affine_run(const Run& run) {
  const AffineRow row = *static_cast<const AffineRow*>(run.row);
  const X* x = static_cast<const X*>(run.x);
  Z* noise = static_cast<Z*>(run.noise);
  X* out = static_cast<X*>(run.out);
  for_each_vector<kNoise>(run, [=](int64_t i, F32 z) {
    if constexpr (kNoise == Noise::none) {
      store(out + i, F32(row.k0) * load(x + i));
    } else {
      if constexpr (kNoise == Noise::given) z = load(noise + i);
      if (kNoise == Noise::drawn && noise != nullptr) store(noise + i, z);
      store(out + i, affine(row, load(x + i), z));
    }
  });
}

template <class X>
void randn(const Run& run) {
  X* out = static_cast<X*>(run.out);
  for_each_vector<Noise::drawn>(static_cast<const NoisyRun&>(run), [=](int64_t i, F32 z) { store(out + i, z); });
}

}  // namespace
}  // namespace ddpm_ext::DDPM_ISA
