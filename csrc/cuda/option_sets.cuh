// Which options a kernel of the step with options is made for. One that knows which tensors its calls do not have takes
// fewer registers and instructions than the one for all of them.
#pragma once

#include <cstdint>

#include "call.h"

namespace ddpm_ext::cuda {

// The bit of a tensor or a factor in a set of them: inputs, then results, then factors.
DDPM_HD constexpr uint32_t bit(Role role) { return 1u << static_cast<int>(role); }
DDPM_HD constexpr uint32_t bit(Result result) { return 1u << (kRoles + static_cast<int>(result)); }
DDPM_HD constexpr uint32_t bit(Factor factor) { return 1u << (kRoles + kResults + static_cast<int>(factor)); }

template <class... Each>
constexpr uint32_t set_of(Each... each) {
  static_assert(kRoles + kResults + kFactors <= 32);
  return (bit(each) | ...);
}

constexpr uint32_t kAlways = set_of(Role::x_t, Role::model_output, Result::out);

// The options of the kernels that take any. Others derive from it, with sets of their own: all that a call must have,
// and all that it may have.
struct AnyOptions {
  static constexpr uint32_t kMust = 0, kMay = ~0u;
  static constexpr int kBlocks = 2;      // that a multiprocessor should hold, by their registers
  static constexpr bool kEight = false;  // whether a thread takes eight elements of 16 bits at once, or four
  // Whether model_input may have any dtype and twice the batch. If not, it is as the samples.
  static constexpr bool kAnyInput = true;
};

// Classifier-free guidance. A loop that calls its model once for both halves has the model's next input.
struct Guided : AnyOptions {
  static constexpr uint32_t kMust = kAlways | set_of(Role::uncond_output);
  static constexpr uint32_t kMay = kMust | set_of(Result::model_input, Factor::output_scale);
  static constexpr int kBlocks = 4;
  static constexpr bool kEight = true, kAnyInput = false;
};

// The predicted clean sample as a result or as what the step keeps, and what the step before kept.
struct WithX0 : AnyOptions {
  static constexpr uint32_t kMust = kAlways;
  static constexpr uint32_t kMay = kMust | set_of(Role::history1, Result::x0_out, Result::history_out);
  static constexpr int kBlocks = 4;
  static constexpr bool kEight = true;
};

// Both, also where a loop calls its model once for both halves.
struct GuidedWithX0 : AnyOptions {
  static constexpr uint32_t kMust = kAlways;
  static constexpr uint32_t kMay = WithX0::kMay | set_of(Role::uncond_output, Result::model_input);
  static constexpr int kBlocks = 4;
  static constexpr bool kAnyInput = false;
};

// What a loop without guidance has: the model's output, and history.
struct WithHistory : AnyOptions {
  static constexpr uint32_t kMust = kAlways;
  static constexpr uint32_t kMay = kMust | set_of(Role::history1, Role::history2, Role::history3, Result::history_out);
  static constexpr int kBlocks = 3;
  static constexpr bool kEight = true;
};

// The model's next input in its dtype, beside what a step of a loop or of other libraries' schedulers has.
struct NextInput : AnyOptions {
  static constexpr uint32_t kMust = kAlways | set_of(Result::model_input);
  static constexpr uint32_t kMay = GuidedWithX0::kMay | WithHistory::kMay | set_of(Role::noise);
  static constexpr int kBlocks = 3;
};

// A variance that the model returns.
struct LearnedVariance : AnyOptions {
  static constexpr uint32_t kMust = kAlways | set_of(Role::model_variance);
  static constexpr uint32_t kMay = kMust | set_of(Role::noise, Result::x0_out);
  static constexpr int kBlocks = 4;
  static constexpr bool kEight = true;
};

// Whether a call has a tensor. Where its kernel's options know, nothing is asked.
template <class Options, class Which>
DDPM_HD bool has(const StepCall& call, Which which) {
  if ((Options::kMust & bit(which)) != 0) return true;
  return (Options::kMay & bit(which)) != 0 && call[which].data != nullptr;
}

// Whether a kernel with these options can take a call.
template <class Options>
bool fits(const StepCall& call) {
  uint32_t given = 0;
  for (int i = 0; i < kRoles; ++i)
    if (call.inputs[i].data != nullptr) given |= bit(static_cast<Role>(i));
  for (int i = 0; i < kResults; ++i)
    if (call.results[i].data != nullptr) given |= bit(static_cast<Result>(i));
  for (int i = 0; i < kFactors; ++i)
    if (call.factors[i].data != nullptr) given |= bit(static_cast<Factor>(i));
  const bool like_x = call.input_again.data == nullptr && (call[Result::model_input].data == nullptr ||
                                                           call[Result::model_input].dtype == call[Role::x_t].dtype);
  return (Options::kMust & ~given) == 0 && (given & ~Options::kMay) == 0 && (Options::kAnyInput || like_x);
}

}  // namespace ddpm_ext::cuda
