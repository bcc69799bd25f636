// Sets of options for which there are specialised kernels of the step with options. A kernel that knows at compile time
// which tensors its calls lack takes fewer registers and instructions than the kernel for all of them.
#pragma once

#include <cstdint>

#include "call.h"

namespace ddpm_ext::cuda {

// The bit of a tensor or a factor in a bit set. Inputs come first, then results, then factors.
DDPM_HD constexpr uint32_t bit(Role role) { return 1u << static_cast<int>(role); }
DDPM_HD constexpr uint32_t bit(Result result) { return 1u << (kRoles + static_cast<int>(result)); }
DDPM_HD constexpr uint32_t bit(Factor factor) { return 1u << (kRoles + kResults + static_cast<int>(factor)); }

template <class... Each>
constexpr uint32_t set_of(Each... each) {
  static_assert(kRoles + kResults + kFactors <= 32);
  return (bit(each) | ...);
}

constexpr uint32_t kAlways = set_of(Role::x_t, Role::model_output, Result::out);

// The options of the kernels that accept any call. Other sets derive from this one: kMust has all that a call must
// have, and kMay all that it may have.
struct AnyOptions {
  static constexpr uint32_t kMust = 0, kMay = ~0u;
  static constexpr int kBlocks = 2;      // per multiprocessor, to limit registers
  static constexpr bool kEight = false;  // whether a thread takes eight 16-bit elements at once, else four
  // Whether model_input may have any dtype and twice the batch. If not, it has the samples' dtype and batch.
  static constexpr bool kAnyInput = true;
};

// Classifier-free guidance. model_input is for loops that call the model once for both halves.
struct Guided : AnyOptions {
  static constexpr uint32_t kMust = kAlways | set_of(Role::uncond_output);
  static constexpr uint32_t kMay = kMust | set_of(Result::model_input, Factor::output_scale);
  static constexpr int kBlocks = 4;
  static constexpr bool kEight = true, kAnyInput = false;
};

// The predicted clean sample as a result or as history, and the previous step's history.
struct WithX0 : AnyOptions {
  static constexpr uint32_t kMust = kAlways;
  static constexpr uint32_t kMay = kMust | set_of(Role::history1, Result::x0_out, Result::history_out);
  static constexpr int kBlocks = 4;
  static constexpr bool kEight = true;
};

// Guidance together with WithX0, with or without model_input.
struct GuidedWithX0 : AnyOptions {
  static constexpr uint32_t kMust = kAlways;
  static constexpr uint32_t kMay = WithX0::kMay | set_of(Role::uncond_output, Result::model_input);
  static constexpr int kBlocks = 4;
  static constexpr bool kAnyInput = false;
};

// The tensors of a loop without guidance: the model's output and history.
struct WithHistory : AnyOptions {
  static constexpr uint32_t kMust = kAlways;
  static constexpr uint32_t kMay = kMust | set_of(Role::history1, Role::history2, Role::history3, Result::history_out);
  static constexpr int kBlocks = 3;
  static constexpr bool kEight = true;
};

// The model's next input in any dtype, together with the tensors of a loop's step or of a step of other libraries'
// schedulers.
struct NextInput : AnyOptions {
  static constexpr uint32_t kMust = kAlways | set_of(Result::model_input);
  static constexpr uint32_t kMay = GuidedWithX0::kMay | WithHistory::kMay | set_of(Role::noise);
  static constexpr int kBlocks = 3;
};

// A variance returned by the model.
struct LearnedVariance : AnyOptions {
  static constexpr uint32_t kMust = kAlways | set_of(Role::model_variance);
  static constexpr uint32_t kMay = kMust | set_of(Role::noise, Result::x0_out);
  static constexpr int kBlocks = 4;
  static constexpr bool kEight = true;
};

// Whether a call has a tensor. Where the options decide this at compile time, nothing is checked at run time.
template <class Options, class Which>
DDPM_HD bool has(const StepCall& call, Which which) {
  if ((Options::kMust & bit(which)) != 0) return true;
  return (Options::kMay & bit(which)) != 0 && call[which].data != nullptr;
}

// Whether a kernel with these options accepts a call.
template <class Options>
bool fits(const StepCall& call) {
  uint32_t present = 0;
  for (int i = 0; i < kRoles; ++i)
    if (call.inputs[i].data != nullptr) present |= bit(static_cast<Role>(i));
  for (int i = 0; i < kResults; ++i)
    if (call.results[i].data != nullptr) present |= bit(static_cast<Result>(i));
  for (int i = 0; i < kFactors; ++i)
    if (call.factors[i].data != nullptr) present |= bit(static_cast<Factor>(i));
  const bool like_x = call.input_again.data == nullptr && (call[Result::model_input].data == nullptr ||
                                                           call[Result::model_input].dtype == call[Role::x_t].dtype);
  return (Options::kMust & ~present) == 0 && (present & ~Options::kMay) == 0 && (Options::kAnyInput || like_x);
}

}  // namespace ddpm_ext::cuda
