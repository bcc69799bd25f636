// The seam between kernels and noise on the CPU: the normals of a run, and the loop over its vectors. On a GPU this is
// cuda/normals.cuh.
#pragma once

namespace ddpm_ext::DDPM_ISA {
namespace {

// Turns the words of these blocks into their normals: four vectors, in memory order.
DDPM_HD void normals(const U32 (&w)[4], F32 (&z)[4]) {
  box_muller(w[0], w[1], z[0], z[1]);
  box_muller(w[2], w[3], z[2], z[3]);
  transpose(z);
}

// Calls body(offset, z) for every four vectors of the run. z is their noise if it is drawn.
template <Noise kNoise, class Run, class Body>
DDPM_HD void for_each_four(const Run& run, Body body) {
  static_assert(kRunMultiple % (4 * F32::kLanes) == 0);
  // Copies, since the compiler cannot know that the body's stores leave them as they are.
  const PhiloxSample counter = run.counter;
  const PhiloxKeys keys = *run.keys;
  const int64_t count = run.count;
  // As many blocks as a vector has lanes. Their products with kPhiloxM0 grow by the same number from one to the next.
  Products first = multiply_wide(block_words(run.block), kPhiloxM0);
  U32 w[4];
  if constexpr (kNoise == Noise::drawn) philox_words(keys, counter, first, w);
  for (int64_t i = 0; i < count; i += 4 * F32::kLanes) {
    F32 z[4];
    if constexpr (kNoise == Noise::drawn) {
      // Both are long chains of dependent instructions, so the next words are drawn in parallel with these normals.
      normals(w, z);
      first = first + uint64_t{kPhiloxM0} * F32::kLanes;
      philox_words(keys, counter, first, w);
    }
    body(i, z);
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
