// The noise of the GPU kernels: the four normals of a Philox block, computed as two pairs. cpu/kernels/normals.h does
// the same on the CPU.
#pragma once

#include "core/box_muller.h"
#include "core/philox.h"
#include "cuda/pair.cuh"

namespace ddpm_ext::cuda {

// Draws the noise of four neighbouring elements: z[0] and z[1] are the pairs of normals of the Philox block that
// contains element j.
template <class Index>
__device__ __forceinline__ void draw_normals(const PhiloxKeys& keys, const PhiloxSample& sample, Index j, F2* z) {
  uint32_t w[4];
  F2 even, odd;
  philox_block(keys, sample, static_cast<uint32_t>(j >> 2), w);
  box_muller(U2(w[0], w[2]), U2(w[1], w[3]), even, odd);
  z[0] = F2(even.v.x, odd.v.x);
  z[1] = F2(even.v.y, odd.v.y);
}

}  // namespace ddpm_ext::cuda
