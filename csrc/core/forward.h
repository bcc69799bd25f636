// One element of the forward process, x_t = k0 x_start + k1 z. The predicted clean sample and the posterior mean are
// affine in two tensors as well and use the same function.
#pragma once

#include "core/scalar.h"

namespace ddpm_ext {

struct alignas(8) AffineRow {
  float k0, k1;
};

template <class F>
DDPM_HD F affine(const AffineRow& row, F x, F z) {
  return fma(F(row.k0), x, F(row.k1) * z);
}

}  // namespace ddpm_ext
