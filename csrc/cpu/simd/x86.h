// Philox's words for all vector types of x86, which have an instruction that multiplies every other word to 64 bits.
// Before including this, a file defines multiply_even, which is that instruction; xor3, for three vectors; and shuffle,
// which takes two words of each of two vectors in every 128 bits.
#pragma once

#include "cpu/simd/vector.h"

namespace ddpm_ext::DDPM_ISA {

using Longs = uint64_t __attribute__((vector_size(sizeof(Integers))));

DDPM_HD Integers upper_words(Integers x) { return Integers(Longs(x) >> 32); }

// Words of Philox's state, one for each lane. Even and odd words are in separate registers, each in the low half of a
// 64-bit lane whose upper half is never read. So the low word of a product needs no instruction, and its high word
// needs one shift.
struct Words {
  Integers even, odd;
  Words() = default;
  Words(Integers e, Integers o) : even(e), odd(o) {}
  explicit Words(uint32_t x) : Words(broadcast(x), broadcast(x)) {}
  explicit Words(U32 u) : Words(u.v, upper_words(u.v)) {}
};
struct __attribute__((may_alias)) Products {  // PixelsMemory stores them as uint64_t
  Integers even, odd;
};

DDPM_HD Products multiply_wide(Words a, uint32_t b) {
  return {multiply_even(a.even, broadcast(b)), multiply_even(a.odd, broadcast(b))};
}
DDPM_HD Words high(Products p) { return {upper_words(p.even), upper_words(p.odd)}; }
DDPM_HD Words low(Products p) { return {p.even, p.odd}; }
DDPM_HD Products operator+(Products p, Products q) {
  return {Integers(Longs(p.even) + Longs(q.even)), Integers(Longs(p.odd) + Longs(q.odd))};
}
DDPM_HD Products operator+(Products p, uint64_t x) { return {Integers(Longs(p.even) + x), Integers(Longs(p.odd) + x)}; }
DDPM_HD Words operator^(Words a, uint32_t b) { return {a.even ^ broadcast(b), a.odd ^ broadcast(b)}; }
DDPM_HD Words xor3(Words a, Words b, uint32_t c) {
  return {xor3(a.even, b.even, broadcast(c)), xor3(a.odd, b.odd, broadcast(c))};
}
DDPM_HD U32 xor3(U32 a, U32 b, uint32_t c) { return xor3(a.v, b.v, broadcast(c)); }

// Numbers as Words, such that join() returns them in the same order.
DDPM_HD Words words_in_order(U32 u) { return Words(U32(Integers(shuffle<0xD8>(Floats(u.v), Floats(u.v))))); }

// Every 128 bits of the result have two even words before two odd ones.
DDPM_HD U32 join(Words w) { return Integers(shuffle<0x88>(Floats(w.even), Floats(w.odd))); }
DDPM_HD U32 join_high(Products p) { return Integers(shuffle<0xDD>(Floats(p.even), Floats(p.odd))); }

// Before, z[k] holds element k of every block. Afterwards the four vectors hold the elements in memory order.
// Transposing every 128 bits is enough, because block_words() numbers the blocks of a vector's lanes accordingly.
DDPM_HD void transpose(F32 (&z)[4]) {
  const Floats a = shuffle<0x44>(z[0].v, z[1].v), b = shuffle<0x44>(z[2].v, z[3].v);
  const Floats c = shuffle<0xEE>(z[0].v, z[1].v), d = shuffle<0xEE>(z[2].v, z[3].v);
  z[0] = shuffle<0x88>(a, b);
  z[1] = shuffle<0xDD>(a, b);
  z[2] = shuffle<0x88>(c, d);
  z[3] = shuffle<0xDD>(c, d);
}

}  // namespace ddpm_ext::DDPM_ISA
