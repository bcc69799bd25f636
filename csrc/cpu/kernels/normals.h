// The seam between kernels and noise on the CPU: the normals of a run, and the loop over its vectors. On a GPU this is
// cuda/normals.cuh.
#pragma once

namespace ddpm_ext::DDPM_ISA {
namespace {

// Draws Philox's words for as many blocks as a vector has lanes, beginning with `block`.
DDPM_HD void draw_words(const PhiloxKeys& keys, const PhiloxSample& counter, uint32_t block, U32 (&w)[4]) {
  Words words[4];
  philox_block(keys, counter, block_words(block), words);
  for (int k = 0; k < 4; ++k) w[k] = join(words[k]);
}

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
  const PhiloxSample counter =
      run.counter;  // a copy, since the compiler cannot know that the body's stores leave it as it is
  const int64_t count = run.count;
  uint32_t block = run.block;
  U32 w[4];
  if constexpr (kNoise == Noise::drawn) draw_words(*run.keys, counter, block, w);
  for (int64_t i = 0; i < count; i += 4 * F32::kLanes) {
    F32 z[4];
    if constexpr (kNoise == Noise::drawn) {
      // Both are long chains of dependent instructions, so the next words are drawn in parallel with these normals.
      normals(w, z);
      draw_words(*run.keys, counter, block += F32::kLanes, w);
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
