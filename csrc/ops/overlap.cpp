#include "ops/overlap.h"

#include <c10/util/SmallVector.h>

#include <algorithm>

namespace ddpm_ext {
namespace {

// Stands for any of the numbers stride * i with i from 0 to `last`.
struct Term {
  int64_t stride, last;
};
using Terms = c10::SmallVector<Term, 16>;

// Adds terms whose sum can be the offset of any byte of the tensor, from the tensor's first byte.
void add_terms(Terms& terms, const at::Tensor& t) {
  for (int64_t d = 0; d < t.dim(); ++d)
    if (t.size(d) > 1 && t.stride(d) > 0) terms.push_back({t.stride(d) * t.element_size(), t.size(d) - 1});
  if (t.element_size() > 1) terms.push_back({1, t.element_size() - 1});
}

// Returns the largest sum of the terms.
int64_t largest_sum(const Term* begin, const Term* end) {
  int64_t sum = 0;
  for (const Term* term = begin; term != end; ++term) sum += term->stride * term->last;
  return sum;
}

// Whether the sum of the terms can be `target`. The terms must be sorted by stride, the largest first. Each call takes
// one from `budget`. When nothing is left of it, the search ends, and the result is true.
bool can_sum_to(const Term* begin, const Term* end, int64_t target, int& budget) {
  if (target < 0 || target > largest_sum(begin, end)) return false;
  if (target == 0) return true;
  if (--budget < 0) return true;
  const int64_t others = largest_sum(begin + 1, end);
  const int64_t first = std::max<int64_t>(0, (target - others + begin->stride - 1) / begin->stride);
  for (int64_t i = std::min(begin->last, target / begin->stride); i >= first; --i)
    if (can_sum_to(begin + 1, end, target - i * begin->stride, budget)) return true;
  return false;
}

void sort(Terms& terms) {
  std::sort(terms.begin(), terms.end(), [](const Term& a, const Term& b) { return a.stride > b.stride; });
}

}  // namespace

bool may_overlap_itself(const at::Tensor& t) {
  if (t.numel() <= 1 || t.is_non_overlapping_and_dense()) return false;
  Terms terms;
  for (int64_t d = 0; d < t.dim(); ++d) {
    if (t.size(d) == 1) continue;
    if (t.stride(d) == 0) return true;
    terms.push_back({t.stride(d), t.size(d) - 1});
  }
  sort(terms);
  for (const Term* term = terms.begin(); term != terms.end(); ++term)
    if (term->stride <= largest_sum(term + 1, terms.end())) return true;
  return false;
}

bool may_overlap(const at::Tensor& a, const at::Tensor& b) {
  if (a.numel() == 0 || b.numel() == 0 || !a.is_alias_of(b)) return false;
  // The tensors share a byte if address_a + offset_a = address_b + offset_b. With offset_b = last_b - n, where n is the
  // distance from b's last byte, this is offset_a + n = address_b - address_a + last_b. So all terms are positive.
  Terms of_b;
  add_terms(of_b, b);
  const int64_t last_b = largest_sum(of_b.begin(), of_b.end());
  const int64_t distance = static_cast<const char*>(b.const_data_ptr()) - static_cast<const char*>(a.const_data_ptr());
  Terms terms = of_b;
  add_terms(terms, a);
  sort(terms);
  int budget = 10000;
  return can_sum_to(terms.begin(), terms.end(), distance + last_b, budget);
}

}  // namespace ddpm_ext
