// The seam between kernels and noise on the CPU: the normals of a run, and the loop over its vectors. On a GPU this is
// cuda/normals.cuh.
#pragma once

#include "cpu/kernels/noise_by_pixels.h"

namespace ddpm_ext::DDPM_ISA {
namespace {

// Draws the normals of a vector of blocks, z[k] with element k of each, from the words that the call before drew, and
// the next words. Both are long chains of dependent instructions, which run in parallel. next() returns the products of
// the next blocks' numbers with kPhiloxM0.
template <class Next>
DDPM_HD void draw(const PhiloxKeys& keys, const PhiloxSample& counter, Next next, U32 (&w)[4], F32 (&z)[4]) {
  box_muller(w[0], w[1], z[0], z[1]);
  box_muller(w[2], w[3], z[2], z[3]);
  philox_words(keys, counter, next(), w);
}

// Calls body(offset, z) for every four vectors of the run. z is their noise if it is drawn.
template <Noise kNoise, class Run, class Body>
DDPM_HD void for_each_four(const Run& run, Body body) {
  constexpr int64_t kFour = 4 * F32::kLanes;
  static_assert(kRunMultiple % kFour == 0);
  // Copies, since the compiler cannot know that the body's stores leave them as they are.
  const PhiloxSample counter = run.counter;
  const PhiloxKeys keys = *run.keys;
  const int64_t count = run.count;
  if constexpr (kNoise == Noise::drawn && std::is_base_of_v<PixelsRun, Run>) {
    // A large body is faster if it comes before the next draw, in logical order, too.
    if (std::is_same_v<Run, StepRun> || run.channels > 1) {
      NoiseByPixels noise(run);
      const auto next = [&]() __attribute__((always_inline)) { return noise.next(); };
      const int64_t ahead = noise.ahead();
      U32 w[4];
      F32 z[4] = {F32(0.0f), F32(0.0f), F32(0.0f), F32(0.0f)};
      philox_words(keys, counter, next(), w);
      for (int64_t i = -ahead; i < count; i += kFour) {
        // Most turns need no condition. Within one, the compiler loads the same constants each time.
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
    // As many blocks as a vector has lanes. Their products with kPhiloxM0 grow by the same number from one to the next.
    Products first = multiply_wide(block_words(run.block), kPhiloxM0);
    const auto next = [&]() __attribute__((always_inline)) {
      const Products products = first;
      first = first + uint64_t{kPhiloxM0} * F32::kLanes;
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
