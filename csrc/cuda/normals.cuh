// The noise of a GPU's kernels: the normals of a Philox block, two at a time. On the CPU this is cpu/kernels/normals.h.
#pragma once

#include "core/box_muller.h"
#include "core/philox.h"
#include "cuda/pair.cuh"

namespace ddpm_ext::cuda {

// Draws the normals of the block of four elements that contains element j, as two pairs.
template <class Index>
__device__ __forceinline__ void draw_normals(const PhiloxKeys& keys, const PhiloxSample& sample, Index j, F2* z) {
  uint32_t w[4];
  F2 even, odd;
  philox_block(keys, sample, static_cast<uint32_t>(j >> 2), w);
  box_muller(U2(w[0], w[2]), U2(w[1], w[3]), even, odd);
  z[0] = F2(even.v.x, odd.v.x);
  z[1] = F2(even.v.y, odd.v.y);
}

// Draws the normals of the elements from j on, where j + phase is the first of a block, as two pairs.
template <class Index>
__device__ __forceinline__ void draw_normals(const PhiloxKeys& keys, const PhiloxSample& sample, Index j, int phase,
                                             F2* z) {
  draw_normals(keys, sample, j + phase, z);
  if (phase == 0) return;
  F2 before[2];
  draw_normals(keys, sample, j + phase - 4, before);
  const float all[8] = {before[0].v.x, before[0].v.y, before[1].v.x, before[1].v.y,
                        z[0].v.x,      z[0].v.y,      z[1].v.x,      z[1].v.y};
  // The four begin at all[4 - phase]: the first shift is by two places or none, the second by one or none.
  float shifted[5], four[4];
  DDPM_UNROLL
  for (int i = 0; i < 5; ++i) shifted[i] = phase < 3 ? all[i + 2] : all[i];
  DDPM_UNROLL
  for (int i = 0; i < 4; ++i) four[i] = phase & 1 ? shifted[i + 1] : shifted[i];
  z[0] = F2(four[0], four[1]), z[1] = F2(four[2], four[3]);
}

}  // namespace ddpm_ext::cuda
