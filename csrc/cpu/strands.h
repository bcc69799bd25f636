// Sums over a sample's chunks, or over a batch.
#pragma once

#include <algorithm>

#include "core/loss.h"

namespace ddpm_ext::cpu {

// Adds up value(0) to value(count - 1) in the order of kLossStrands in core/loss.h. Strands without a value would be
// zero and are skipped.
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
