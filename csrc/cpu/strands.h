// Sums over the chunks of a sample, or over the samples of a batch, in the order of core/loss.h.
#pragma once

#include <algorithm>

#include "core/loss.h"

namespace ddpm_ext::cpu {

// Returns the sum of value(0) to value(count - 1). Value i is added to strand i mod kLossStrands, and the strands are
// then added by halves (core/loss.h). Halves in which all strands would be zero are skipped.
template <class Value>
auto sum_by_strands(int64_t count, Value value) {
  decltype(value(count)) strands[kLossStrands];
  int used = 1;
  while (used < kLossStrands && used < count) used *= 2;
  std::fill(strands, strands + used, decltype(value(count)){});
  for (int64_t i = 0; i < count; ++i) strands[i % kLossStrands] += value(i);
  for (int h = used / 2; h > 0; h /= 2)
    for (int i = 0; i < h; ++i) strands[i] += strands[i + h];
  return strands[0];
}

}  // namespace ddpm_ext::cpu
