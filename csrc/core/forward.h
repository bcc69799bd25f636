// One element of the forward process, x_t = k0 x_start + k1 z. The predicted clean sample and the posterior mean are
// affine in two tensors as well and use the same function. Where k1 is -k0, the difference is taken first: x0 from eps
// at a timestep whose alphas_cumprod is nearly 0 is far smaller than either product, and than the products' rounding.
#pragma once

#include "core/scalar.h"

namespace ddpm_ext {

struct alignas(8) AffineRow {
  float k0, k1;
};

template <class F>
DDPM_HD F affine(const AffineRow& row, F x, F z) {
  if (row.k1 == -row.k0) return F(row.k0) * fma(F(-1.0f), z, x);
  return fma(F(row.k0), x, F(row.k1) * z);
}

}  // namespace ddpm_ext
