// The kernels of one instruction set. A file in cpu/isa/ defines DDPM_ISA as their namespace, includes the vector type
// from cpu/simd/ and then this file.
#pragma once

#include "cpu/kernels/loss.h"
#include "cpu/kernels/quantile.h"
#include "cpu/kernels/spread.h"
#include "cpu/kernels/step_with_options.h"
#include "cpu/kernels/steps.h"

namespace ddpm_ext::DDPM_ISA {

// The kernels by the dtype of x and then by that of the second tensor, which may be lower if x is float32.
#define DDPM_BY_DTYPE(kernel, noise)                                                                \
  {                                                                                                 \
      {kernel<noise, float, float>, kernel<noise, float, Float16>, kernel<noise, float, BFloat16>}, \
      {nullptr, kernel<noise, Float16, Float16>, nullptr},                                          \
      {nullptr, nullptr, kernel<noise, BFloat16, BFloat16>},                                        \
  }
#define DDPM_BY_ONE_DTYPE(kernel, noise)                     \
  {                                                          \
      {kernel<noise, float, float>, nullptr, nullptr},       \
      {nullptr, kernel<noise, Float16, Float16>, nullptr},   \
      {nullptr, nullptr, kernel<noise, BFloat16, BFloat16>}, \
  }
#define DDPM_STRING2(x) #x
#define DDPM_STRING(x) DDPM_STRING2(x)

const Kernels kernels = {
    DDPM_STRING(DDPM_ISA),
    {DDPM_BY_DTYPE(reverse_step, Noise::none), DDPM_BY_DTYPE(reverse_step, Noise::given),
     DDPM_BY_DTYPE(reverse_step, Noise::drawn)},
    {DDPM_BY_ONE_DTYPE(affine_run, Noise::none), DDPM_BY_DTYPE(affine_run, Noise::given),
     DDPM_BY_ONE_DTYPE(affine_run, Noise::drawn)},
    {randn<float>, randn<Float16>, randn<BFloat16>},
    {DDPM_BY_DTYPE(step_with_options, false), DDPM_BY_DTYPE(step_with_options, true)},
    {DDPM_BY_DTYPE(loss_run, Noise::none), DDPM_BY_DTYPE(loss_run, Noise::given),
     DDPM_BY_DTYPE(loss_run, Noise::drawn)},
    {DDPM_BY_DTYPE(variational_run, Noise::none), DDPM_BY_DTYPE(variational_run, Noise::given),
     DDPM_BY_DTYPE(variational_run, Noise::drawn)},
    {{magnitudes<float, float>, magnitudes<float, Float16>, magnitudes<float, BFloat16>},
     {nullptr, magnitudes<Float16, Float16>, nullptr},
     {nullptr, nullptr, magnitudes<BFloat16, BFloat16>}},
    group_maxima,
    select,
    {moments<float>, moments<Float16>, moments<BFloat16>},
};

}  // namespace ddpm_ext::DDPM_ISA
