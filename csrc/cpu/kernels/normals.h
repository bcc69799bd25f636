// The loops of the CPU kernels over the vectors of a run, with the noise of each vector. cuda/normals.cuh draws the
// noise of the GPU kernels.
#pragma once

#include "cpu/kernels/noise_by_pixels.h"

namespace ddpm_ext::DDPM_ISA {
namespace {

// Computes the normals z of a vector of blocks from their words w. z[k] has element k of each block. Then draws the
// words of the next vector of blocks into w. Each computation is a long chain of dependent instructions. But neither
// needs the result of the other, so the CPU runs them in parallel. next() returns the products of kPhiloxM0 and the
// next block numbers.
template <class Next>
DDPM_HD void draw(const PhiloxKeys& keys, const PhiloxSample& counter, Next next, U32 (&w)[4], F32 (&z)[4]) {
  box_muller(w[0], w[1], z[0], z[1]);
  box_muller(w[2], w[3], z[2], z[3]);
  philox_words(keys, counter, next(), w);
}

// Calls body(offset, z) for every four vectors of the run. If noise is drawn, z is the vectors' noise.
template <Noise kNoise, class Run, class Body>
DDPM_HD void for_each_four(const Run& run, Body body) {
  constexpr int64_t kFour = 4 * F32::kLanes;
  static_assert(kRunMultiple % kFour == 0);
  // Local copies: the compiler must assume that the body's stores change `run`.
  const PhiloxSample counter = run.counter;
  const PhiloxKeys keys = *run.keys;
  const int64_t count = run.count;
  if constexpr (kNoise == Noise::drawn && std::is_base_of_v<PixelsRun, Run>) {
    // This loop calls the body before it draws the next normals, which is faster for a large body. So the step with
    // options takes this path in logical order, too.
    if (std::is_same_v<Run, StepRun> || run.channels > 1) {
      NoiseByPixels noise(run);
      const auto next = [&]() __attribute__((always_inline)) { return noise.next(); };
      const int64_t ahead = noise.ahead();
      U32 w[4];
      F32 z[4] = {F32(0.0f), F32(0.0f), F32(0.0f), F32(0.0f)};
      philox_words(keys, counter, next(), w);
      for (int64_t i = -ahead; i < count; i += kFour) {
        // These iterations need no conditions. With the conditions, the compiler would load constants in each
        // iteration.
        for (; i >= 0 && i < count - ahead; i += kFour) {
          body(i, z);
          draw(keys, counter, next, w, z);
          noise.exchange(z);
        }
        if (i >= 0) body(i, z);
        if (i < count - ahead) draw(keys, counter, next, w, z);
        noise.exchange(z);
      }
      return;
    }
  }
  if constexpr (kNoise == Noise::drawn) {
    // The products of kPhiloxM0 and the block numbers of a vector. From one vector to the next they grow by a constant.
    Products following = multiply_wide(block_words(run.block), kPhiloxM0);
    const auto next = [&]() __attribute__((always_inline)) {
      const Products products = following;
      following = following + uint64_t{kPhiloxM0} * F32::kLanes;
      return products;
    };
    U32 w[4];
    philox_words(keys, counter, next(), w);
    for (int64_t i = 0; i < count; i += kFour) {
      F32 z[4];
      draw(keys, counter, next, w, z);
      transpose(z);
      body(i, z);
    }
  } else {
    for (int64_t i = 0; i < count; i += kFour) {
      F32 z[4];
      body(i, z);
    }
  }
}

// Calls body(offset, z) for every vector of the run.
template <Noise kNoise, class Run, class Body>
DDPM_HD void for_each_vector(const Run& run, Body body) {
  for_each_four<kNoise>(run, [=](int64_t i, const F32(&z)[4]) __attribute__((always_inline)) {
    for (int k = 0; k < 4; ++k) body(i + k * F32::kLanes, z[k]);
  });
}

}  // namespace
}  // namespace ddpm_ext::DDPM_ISA
