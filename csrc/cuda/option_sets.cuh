// Which options a kernel is made for. One that knows which tensors its calls do not have takes fewer registers and
// instructions than the one for all of them.
#pragma once

#include <cstdint>

#include "call.h"

namespace ddpm_ext::cuda {

// The bit of a tensor or a factor in a set of them: inputs, then results, then factors.
template <class Step>
DDPM_HD constexpr uint32_t bit(typename Step::Role role) {
  return 1u << static_cast<int>(role);
}
template <class Step>
DDPM_HD constexpr uint32_t bit(typename Step::Result result) {
  return 1u << (kRoles<Step> + static_cast<int>(result));
}
template <class Step>
DDPM_HD constexpr uint32_t bit(typename Step::Factor factor) {
  return 1u << (kRoles<Step> + kResults<Step> + static_cast<int>(factor));
}
template <class Step, class... Each>
constexpr uint32_t set_of(Each... each) {
  static_assert(kRoles<Step> + kResults<Step> + kFactors<Step> <= 32);
  return (bit<Step>(each) | ...);
}

// The options of the kernels that take any. Others derive from it, with sets of their own: all that a call must have,
// and all that it may have.
template <class Step>
struct AnyOptions {
  static constexpr uint32_t kMust = 0, kMay = ~0u;
  static constexpr int kBlocks = 2;        // that a multiprocessor should hold, by their registers
  static constexpr bool kWords = false;    // whether there is a kernel of Access::words
  static constexpr bool kSettings = true;  // whether the call's settings are read; if not, they are the default
};

// Whether a call has a tensor. Where its kernel's options know, nothing is asked.
template <class Options, class Step, class Which>
DDPM_HD bool has(const StepCall<Step>& call, Which which) {
  if ((Options::kMust & bit<Step>(which)) != 0) return true;
  return (Options::kMay & bit<Step>(which)) != 0 && call[which].data != nullptr;
}

// Whether a kernel with these options can take a call.
template <class Options, class Step>
bool fits(const StepCall<Step>& call) {
  uint32_t given = 0;
  for (int i = 0; i < kRoles<Step>; ++i)
    if (call.inputs[i].data != nullptr) given |= bit<Step>(static_cast<typename Step::Role>(i));
  for (int i = 0; i < kResults<Step>; ++i)
    if (call.results[i].data != nullptr) given |= bit<Step>(static_cast<typename Step::Result>(i));
  for (int i = 0; i < kFactors<Step>; ++i)
    if (call.factors[i].data != nullptr) given |= bit<Step>(static_cast<typename Step::Factor>(i));
  return (Options::kMust & ~given) == 0 && (given & ~Options::kMay) == 0;
}

}  // namespace ddpm_ext::cuda
