// Philox's words for all vector types of x86. Before a file includes this, it defines:
// - multiply_even(a, b): the instruction that multiplies the even words of two vectors to 64-bit products
// - xor3(a, b, c), for vectors
// - shuffle<kWords>(a, b): in every 128 bits, two chosen words of a and then two chosen words of b
#pragma once

#include "cpu/simd/vector.h"

namespace ddpm_ext::DDPM_ISA {

using Longs = uint64_t __attribute__((vector_size(sizeof(Integers))));

DDPM_HD Integers upper_words(Integers x) { return Integers(Longs(x) >> 32); }

// Words of Philox's state, one for each lane. Even and odd words are in separate registers. A word is in the low half
// of a 64-bit lane, and the upper half is not used. So the low word of a product needs no instruction, and its high
// word needs one shift.
struct Words {
  Integers even, odd;
  Words() = default;
  Words(Integers e, Integers o) : even(e), odd(o) {}
  explicit Words(uint32_t x) : Words(broadcast(x), broadcast(x)) {}
  explicit Words(U32 u) : Words(u.v, upper_words(u.v)) {}
};
struct __attribute__((may_alias)) Products {  // may_alias: PixelsMemory stores these as uint64_t
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

// Returns the Words from which join() returns u.
DDPM_HD Words words_in_order(U32 u) { return Words(U32(Integers(shuffle<0xD8>(Floats(u.v), Floats(u.v))))); }

// Return the words, or the high words of the products, as one vector: in every 128 bits, two even words and then two
// odd words.
DDPM_HD U32 join(Words w) { return Integers(shuffle<0x88>(Floats(w.even), Floats(w.odd))); }
DDPM_HD U32 join_high(Products p) { return Integers(shuffle<0xDD>(Floats(p.even), Floats(p.odd))); }

// Reorders the elements of blocks. Before, z[k] has element k of every block. Afterwards, z[0] to z[3] have the
// elements in the order of memory. Transposing within every 128 bits suffices, because block_words() numbers the lanes
// accordingly.
DDPM_HD void transpose(F32 (&z)[4]) {
  const Floats a = shuffle<0x44>(z[0].v, z[1].v), b = shuffle<0x44>(z[2].v, z[3].v);
  const Floats c = shuffle<0xEE>(z[0].v, z[1].v), d = shuffle<0xEE>(z[2].v, z[3].v);
  z[0] = shuffle<0x88>(a, b);
  z[1] = shuffle<0xDD>(a, b);
  z[2] = shuffle<0x88>(c, d);
  z[3] = shuffle<0xDD>(c, d);
}

}  // namespace ddpm_ext::DDPM_ISA
