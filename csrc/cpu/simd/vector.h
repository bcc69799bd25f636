// The vector types F32 and U32, and their operations that are the same for all instruction sets: those that g++ and
// clang have as built-in operators. Before a file includes this, it defines DDPM_ISA as its namespace. In that
// namespace it defines Floats and Integers, the vector types of its instructions, and broadcast, which copies a number
// to every lane.
#pragma once

namespace ddpm_ext::DDPM_ISA {

using Signed = int32_t __attribute__((vector_size(sizeof(Floats))));
using Unsigned = uint32_t __attribute__((vector_size(sizeof(Floats))));

struct F32 {
  static constexpr int kLanes = sizeof(Floats) / sizeof(float);
  Floats v;
  F32() = default;
  F32(Floats x) : v(x) {}
  explicit F32(float x) : v(broadcast(x)) {}
};
struct U32 {
  Integers v;
  U32() = default;
  U32(Integers x) : v(x) {}
  explicit U32(uint32_t x) : v(broadcast(x)) {}
};

DDPM_HD F32 operator+(F32 a, F32 b) { return a.v + b.v; }
DDPM_HD F32 operator*(F32 a, F32 b) { return a.v * b.v; }

DDPM_HD U32 operator+(U32 a, U32 b) { return Integers(Unsigned(a.v) + Unsigned(b.v)); }
DDPM_HD U32 operator-(U32 a, U32 b) { return Integers(Unsigned(a.v) - Unsigned(b.v)); }
DDPM_HD U32 operator&(U32 a, U32 b) { return a.v & b.v; }
DDPM_HD U32 operator<<(U32 a, int n) { return Integers(Unsigned(a.v) << n); }

// Returns a vector of chosen lanes of a and b. The lanes of a are numbered from 0, and the lanes of b follow.
template <size_t... lanes>
DDPM_HD F32 choose(F32 a, F32 b) {
#if defined(__clang__) || __GNUC__ >= 12
  return Floats(__builtin_shufflevector(a.v, b.v, lanes...));
#else
  return Floats(__builtin_shuffle(a.v, b.v, Signed{lanes...}));
#endif
}

DDPM_HD F32 bits_to_float(U32 u) { return Floats(u.v); }
DDPM_HD U32 float_to_bits(F32 f) { return Integers(f.v); }
DDPM_HD F32 signed_to_float(U32 u) { return __builtin_convertvector(Signed(u.v), Floats); }
DDPM_HD F32 unsigned_to_float(U32 u) { return __builtin_convertvector(Unsigned(u.v), Floats); }
DDPM_HD F32 flip_sign(F32 f, U32 u) { return Floats(Integers(f.v) ^ (u.v & broadcast(0x80000000u))); }

// Rounds each lane to BFloat16, to nearest even. The result is in the upper half of the lane. Any NaN becomes the quiet
// NaN.
DDPM_HD U32 to_bfloat16(F32 x) {
  const Unsigned bits = Unsigned(x.v), rounded = bits + 0x7fff + (bits >> 16 & 1);
  return Integers(x.v == x.v ? rounded : Unsigned(broadcast(0x7fc00000u)));
}

}  // namespace ddpm_ext::DDPM_ISA
