// One element of the forward process, x_t = k0 x_start + k1 z. The predicted clean sample and the posterior mean are
// also affine in two tensors and use the same function.
//
// If k1 is -k0, the function subtracts first and then multiplies. This matters for x0 predicted from eps where
// alphas_cumprod is nearly 0: the two products are far larger than x0, and so are their rounding errors.
#pragma once

#include "core/scalar.h"

namespace ddpm_ext {

// A row of an affine operator's table in memory: float32 (rows, 2).
struct alignas(8) AffineRow {
  float k0, k1;
};

template <class F>
DDPM_HD F affine(const AffineRow& row, F x, F z) {
  if (row.k1 == -row.k0) return F(row.k0) * fma(F(-1.0f), z, x);
  return fma(F(row.k0), x, F(row.k1) * z);
}

}  // namespace ddpm_ext
