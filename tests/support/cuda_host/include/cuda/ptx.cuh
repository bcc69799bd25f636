// Replaces csrc/cuda/ptx.cuh, whose functions are GPU instructions, by functions for the CPU.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "standin/threads.h"

namespace standin {

// PTX allows several results of rsqrt.approx. This says which of them rsqrt_approx returns: the nearest to the exact
// result, the least, the greatest, or one chosen by a hash of the argument.
enum class Rsqrt : int { nearest, least, greatest, any };
inline Rsqrt rsqrt_choice = Rsqrt::any;

// Returns the float with these bits.
inline float positive_float(uint32_t bits) {
  float f;
  memcpy(&f, &bits, sizeof f);
  return f;
}

}  // namespace standin

namespace ddpm_ext::cuda {

// The instruction rsqrt.approx.ftz.f32. Returns a float32 within the error that PTX's manual allows, chosen by
// rsqrt_choice.
inline float rsqrt_approx(float x) {
  if (x != x) return NAN;
  if (fabsf(x) < 0x1p-126f) return signbit(x) ? -INFINITY : INFINITY;  // subnormals are flushed
  if (x < 0) return NAN;
  if (x == INFINITY) return 0;
  constexpr double kError = 0x1.125fbep-23;  // 2^-22.9, relative
  const double exact = 1 / ::sqrt(static_cast<double>(x));
  const float rounded = static_cast<float>(exact);
  uint32_t nearest, hash;
  memcpy(&nearest, &rounded, sizeof nearest);
  memcpy(&hash, &x, sizeof hash);
  hash *= 0x9E3779B9u;
  uint32_t least = nearest, greatest = nearest;
  while (standin::positive_float(least - 1) >= exact * (1 - kError)) --least;
  while (standin::positive_float(greatest + 1) <= exact * (1 + kError)) ++greatest;
  switch (standin::rsqrt_choice) {
    case standin::Rsqrt::nearest:
      return rounded;
    case standin::Rsqrt::least:
      return standin::positive_float(least);
    case standin::Rsqrt::greatest:
      return standin::positive_float(greatest);
    case standin::Rsqrt::any:
      break;
  }
  return standin::positive_float(least + static_cast<uint32_t>(uint64_t{hash} * (greatest - least + 1) >> 32));
}

// The instructions max.NaN.f32 and min.NaN.f32. -0 is below 0. If an argument is NaN, the result is NaN.
inline float max_nan(float a, float b) {
  if (a != a || b != b) return NAN;
  if (a == b) return signbit(a) ? b : a;
  return a > b ? a : b;
}
inline float min_nan(float a, float b) { return -max_nan(-a, -b); }

// These accesses are recorded, so that their sectors can be counted (control.h).
template <class Word>
Word load_word(const Word* p) {
  standin::note_access(true, false, p, sizeof(Word));
  return *p;
}
template <class Word>
void store_word(Word* p, Word word) {
  standin::note_access(true, true, p, sizeof(Word));
  *p = word;
}

template <class Word>
void load_word_if(bool condition, const Word* p, Word& word) {
  standin::note_access(condition, false, p, sizeof(Word));
  if (condition) word = *p;
}

inline void keep_uses_behind(float) {}
inline void make_opaque(uint32_t&) {}
inline void make_opaque(int64_t&) {}

template <class T>
T* in_register(T* p) {
  return p;
}

}  // namespace ddpm_ext::cuda
