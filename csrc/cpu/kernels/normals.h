// The seam between kernels and noise on the CPU: the normals of a run, and the loop over its vectors. On a GPU this is
// cuda/normals.cuh.
#pragma once

namespace ddpm_ext::DDPM_ISA {
namespace {

// Calls body(i, z) `count` times. z are the normals of a vector of blocks, z[k] with element k of each. next() returns
// the products of the blocks' numbers with kPhiloxM0, and is called once more than the body.
template <class Next, class Body>
DDPM_HD void for_each_draw(const PhiloxKeys& keys, const PhiloxSample& counter, int64_t count, Next next, Body body) {
  U32 w[4];
  philox_words(keys, counter, next(), w);
  for (int64_t i = 0; i < count; ++i) {
    F32 z[4];
    // Both are long chains of dependent instructions, so the next words are drawn in parallel with these normals.
    box_muller(w[0], w[1], z[0], z[1]);
    box_muller(w[2], w[3], z[2], z[3]);
    philox_words(keys, counter, next(), w);
    body(i, z);
  }
}

// Calls body(offset, z) for every four vectors of the run. z is their noise if it is drawn.
template <Noise kNoise, class Run, class Body>
DDPM_HD void for_each_four(const Run& run, Body body) {
  static_assert(kRunMultiple % (4 * F32::kLanes) == 0);
  // Copies, since the compiler cannot know that the body's stores leave them as they are.
  const PhiloxSample counter = run.counter;
  const PhiloxKeys keys = *run.keys;
  const int64_t count = run.count;
  if constexpr (kNoise == Noise::drawn) {
    // As many blocks as a vector has lanes. Their products with kPhiloxM0 grow by the same number from one to the next.
    Products first = multiply_wide(block_words(run.block), kPhiloxM0);
    const auto next = [&]() __attribute__((always_inline)) {
      const Products products = first;
      first = first + uint64_t{kPhiloxM0} * F32::kLanes;
      return products;
    };
    for_each_draw(keys, counter, count / (4 * F32::kLanes), next,
                  [&](int64_t i, F32(&z)[4]) __attribute__((always_inline)) {
                    transpose(z);
                    body(i * 4 * F32::kLanes, z);
                  });
  } else {
    for (int64_t i = 0; i < count; i += 4 * F32::kLanes) {
      F32 z[4];
      body(i, z);
    }
  }
}

// Calls body(offset, z) for every vector of the run.
template <Noise kNoise, class Body>
DDPM_HD void for_each_vector(const Run& run, Body body) {
  for_each_four<kNoise>(run, [=](int64_t i, const F32(&z)[4]) __attribute__((always_inline)) {
    for (int k = 0; k < 4; ++k) body(i + k * F32::kLanes, z[k]);
  });
}

}  // namespace
}  // namespace ddpm_ext::DDPM_ISA
