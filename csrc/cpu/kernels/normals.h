// The interface between kernels and noise on the CPU: the normals of a run, and the loop over its vectors. The GPU's is
// cuda/normals.cuh.
#pragma once

#include "cpu/kernels/noise_by_pixels.h"

namespace ddpm_ext::DDPM_ISA {
namespace {

// Computes the normals of a vector of blocks from the words that the previous call drew, and then draws the next words.
// z[k] has element k of each block. Both computations are long chains of dependent instructions; separated like this,
// they run in parallel. next() returns the products of the next blocks' numbers with kPhiloxM0.
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
  // Local copies, since the compiler cannot know that the body's stores do not change them.
  const PhiloxSample counter = run.counter;
  const PhiloxKeys keys = *run.keys;
  const int64_t count = run.count;
  if constexpr (kNoise == Noise::drawn && std::is_base_of_v<PixelsRun, Run>) {
    // A large body is faster if it comes before the next draw. So the step with options also takes this path in
    // logical order.
    if (std::is_same_v<Run, StepRun> || run.channels > 1) {
      NoiseByPixels noise(run);
      const auto next = [&]() __attribute__((always_inline)) { return noise.next(); };
      const int64_t ahead = noise.ahead();
      U32 w[4];
      F32 z[4] = {F32(0.0f), F32(0.0f), F32(0.0f), F32(0.0f)};
      philox_words(keys, counter, next(), w);
      for (int64_t i = -ahead; i < count; i += kFour) {
        // Most iterations need no condition. With conditions in the loop, the compiler would load the same constants in
        // each iteration.
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
    // The products with kPhiloxM0 of as many blocks as a vector has lanes. From one vector to the next they grow by a
    // constant.
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
