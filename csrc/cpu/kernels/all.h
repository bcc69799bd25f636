// The table of the kernels of one instruction set. A file in cpu/isa/ first includes a vector type from cpu/simd/,
// which defines DDPM_ISA as the kernels' namespace, and then this file.
#pragma once

#include "cpu/kernels/loss.h"
#include "cpu/kernels/quantile.h"
#include "cpu/kernels/spread.h"
#include "cpu/kernels/step_with_options.h"
#include "cpu/kernels/steps.h"

namespace ddpm_ext::DDPM_ISA {

// The instances of a kernel template, indexed by the dtype of x and the dtype of the second tensor. If x is float32,
// the second dtype may have a lower precision. The macro arguments after `kernel` are the first arguments of the
// template.
#define DDPM_BY_DTYPE(kernel, ...)                                                                                    \
  {                                                                                                                   \
      {kernel<__VA_ARGS__, float, float>, kernel<__VA_ARGS__, float, Float16>, kernel<__VA_ARGS__, float, BFloat16>}, \
      {nullptr, kernel<__VA_ARGS__, Float16, Float16>, nullptr},                                                      \
      {nullptr, nullptr, kernel<__VA_ARGS__, BFloat16, BFloat16>},                                                    \
  }
// The same table, where both dtypes are equal.
#define DDPM_BY_ONE_DTYPE(kernel, ...)                             \
  {                                                                \
      {kernel<__VA_ARGS__, float, float>, nullptr, nullptr},       \
      {nullptr, kernel<__VA_ARGS__, Float16, Float16>, nullptr},   \
      {nullptr, nullptr, kernel<__VA_ARGS__, BFloat16, BFloat16>}, \
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
    {DDPM_BY_DTYPE(step_with_options, Noise::none), DDPM_BY_DTYPE(step_with_options, Noise::drawn)},
    {DDPM_BY_DTYPE(loss_of_run, LossRow, Noise::none), DDPM_BY_DTYPE(loss_of_run, LossRow, Noise::given),
     DDPM_BY_DTYPE(loss_of_run, LossRow, Noise::drawn)},
    {DDPM_BY_DTYPE(loss_of_run, VariationalRow, Noise::none), DDPM_BY_DTYPE(loss_of_run, VariationalRow, Noise::given),
     DDPM_BY_DTYPE(loss_of_run, VariationalRow, Noise::drawn)},
    {{magnitudes<float, float>, magnitudes<float, Float16>, magnitudes<float, BFloat16>},
     {nullptr, magnitudes<Float16, Float16>, nullptr},
     {nullptr, nullptr, magnitudes<BFloat16, BFloat16>}},
    group_maxima,
    select,
    {moments<float>, moments<Float16>, moments<BFloat16>},
};

}  // namespace ddpm_ext::DDPM_ISA
