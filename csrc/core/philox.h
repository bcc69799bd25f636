// Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") and the counter of this
// project's noise. The counter's four words are the block, the draw, the low half of the sample id, and the high half
// of the sample id with the stream in its upper 8 bits.
#pragma once

#include "core/scalar.h"

namespace ddpm_ext {

constexpr uint32_t kPhiloxM0 = 0xD2511F53u, kPhiloxM1 = 0xCD9E8D57u;
constexpr uint32_t kPhiloxW0 = 0x9E3779B9u, kPhiloxW1 = 0xBB67AE85u;
constexpr int kPhiloxRounds = 10;

// The keys of all rounds. They depend only on the seed.
struct PhiloxKeys {
  uint32_t k0[kPhiloxRounds], k1[kPhiloxRounds];
};

DDPM_HD PhiloxKeys philox_keys(uint64_t seed) {
  PhiloxKeys keys;
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  DDPM_UNROLL
  for (int i = 0; i < kPhiloxRounds; ++i, k0 += kPhiloxW0, k1 += kPhiloxW1) keys.k0[i] = k0, keys.k1[i] = k1;
  return keys;
}

// The three words of the counter that are the same for a whole sample.
struct SampleCounter {
  uint32_t draw, id_low, id_high;
};

constexpr uint64_t kIdMask = (uint64_t{1} << 56) - 1;  // the upper 8 bits are for the stream

DDPM_HD SampleCounter sample_counter(uint64_t id, uint32_t stream, uint32_t draw) {
  id &= kIdMask;
  return {draw, static_cast<uint32_t>(id), static_cast<uint32_t>(id >> 32) + (stream << 24)};
}

// The results of rounds 0 and 1 that do not depend on the block, computed once for each sample: one of the two
// multiplications of each round. c0 to c3 are the four words before or after a round. A word with `_key` is already
// xored with the key of its next round. So is c0_high, the high half of a product of c0.
struct PhiloxSample {
  uint32_t c3_key, c0_high, c1_key, c3;
};

DDPM_HD PhiloxSample philox_sample(const PhiloxKeys& keys, const SampleCounter& counter) {
  uint64_t p1 = multiply_wide(counter.id_low, kPhiloxM1);
  uint64_t q0 = multiply_wide(xor3(high(p1), counter.draw, keys.k0[0]), kPhiloxM0);
  return {counter.id_high ^ keys.k1[0], high(q0) ^ keys.k1[1], low(p1) ^ keys.k0[1], low(q0)};
}

// Computes the four random words w[0..3] of the counter (block, draw, id_low, id_high). p0 is the product of block and
// kPhiloxM0. A vector type may keep its words in two halves, of even and of odd lanes. The last round joins the halves,
// since joining takes the fewest instructions at that point.
template <class Product, class U>
DDPM_HD void philox_words(const PhiloxKeys& keys, const PhiloxSample& sample, Product p0, U (&w)[4]) {
  auto p1 = multiply_wide(high(p0) ^ sample.c3_key, kPhiloxM1);
  auto c0 = high(p1) ^ sample.c1_key, c1 = low(p1), c2 = low(p0) ^ sample.c0_high;
  auto c3 = decltype(c0)(sample.c3);
  constexpr int kLast = kPhiloxRounds - 1;
  DDPM_UNROLL
  for (int i = 2; i < kLast; ++i) {
    p0 = multiply_wide(c0, kPhiloxM0), p1 = multiply_wide(c2, kPhiloxM1);
    c0 = xor3(high(p1), c1, keys.k0[i]);
    c1 = low(p1);
    c2 = xor3(high(p0), c3, keys.k1[i]);
    c3 = low(p0);
  }
  p0 = multiply_wide(c0, kPhiloxM0), p1 = multiply_wide(c2, kPhiloxM1);
  w[0] = xor3(join_high(p1), join(c1), keys.k0[kLast]);
  w[1] = join(low(p1));
  w[2] = xor3(join_high(p0), join(c3), keys.k1[kLast]);
  w[3] = join(low(p0));
}

// Computes the four random words of a block.
DDPM_HD void philox_block(const PhiloxKeys& keys, const PhiloxSample& sample, uint32_t block, uint32_t (&w)[4]) {
  philox_words(keys, sample, multiply_wide(block, kPhiloxM0), w);
}

}  // namespace ddpm_ext
