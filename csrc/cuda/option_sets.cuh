// Sets of options for which the step with options has specialised kernels. Such a kernel knows at compile time which
// tensors its calls do not have. So it takes fewer registers and instructions than the kernel for all calls.
#pragma once

#include <cstdint>

#include "call.h"

namespace ddpm_ext::cuda {

// The bit of a tensor or a factor in a bit set. Inputs come first, then results, then factors.
DDPM_HD constexpr uint32_t bit(Role role) { return 1u << static_cast<int>(role); }
DDPM_HD constexpr uint32_t bit(Result result) { return 1u << (kRoles + static_cast<int>(result)); }
DDPM_HD constexpr uint32_t bit(Factor factor) { return 1u << (kRoles + kResults + static_cast<int>(factor)); }

// Returns the bit set of these tensors and factors.
template <class... Members>
constexpr uint32_t set_of(Members... members) {
  static_assert(kRoles + kResults + kFactors <= 32);
  return (bit(members) | ...);
}

constexpr uint32_t kAlways = set_of(Role::x_t, Role::model_output, Result::out);

// The options of the kernels that accept any call. The other sets derive from this one. kMust is the set of tensors and
// factors that a call must have, and kMay the set that it may have.
struct AnyOptions {
  static constexpr uint32_t kMust = 0, kMay = ~0u;
  static constexpr int kBlocks = 2;      // the least number of blocks of a multiprocessor, which limits registers
  static constexpr bool kEight = false;  // whether a thread takes eight 16-bit elements at once, or four
  // Whether model_input may have any dtype and twice the batch. If not, it has the samples' dtype and batch.
  static constexpr bool kAnyInput = true;
};

// Classifier-free guidance. The step may have the factor output_scale, and may write the model's next input in the
// samples' dtype.
struct Guided : AnyOptions {
  static constexpr uint32_t kMust = kAlways | set_of(Role::uncond_output);
  static constexpr uint32_t kMay = kMust | set_of(Result::model_input, Factor::output_scale);
  static constexpr int kBlocks = 4;
  static constexpr bool kEight = true, kAnyInput = false;
};

// A step without guidance that may return the predicted clean sample and a history tensor, and read one history tensor.
struct WithX0 : AnyOptions {
  static constexpr uint32_t kMust = kAlways;
  static constexpr uint32_t kMay = kMust | set_of(Role::history1, Result::x0_out, Result::history_out);
  static constexpr int kBlocks = 4;
  static constexpr bool kEight = true;
};

// A step that may have the tensors of WithX0, guidance, and the model's next input in the samples' dtype.
struct GuidedWithX0 : AnyOptions {
  static constexpr uint32_t kMust = kAlways;
  static constexpr uint32_t kMay = WithX0::kMay | set_of(Role::uncond_output, Result::model_input);
  static constexpr int kBlocks = 4;
  static constexpr bool kAnyInput = false;
};

// A step without guidance that may read up to three history tensors and return one.
struct WithHistory : AnyOptions {
  static constexpr uint32_t kMust = kAlways;
  static constexpr uint32_t kMay = kMust | set_of(Role::history1, Role::history2, Role::history3, Result::history_out);
  static constexpr int kBlocks = 3;
  static constexpr bool kEight = true;
};

// A step that writes the model's next input in any dtype. It may have guidance, history tensors, the predicted clean
// sample as a result, and noise from the caller.
struct NextInput : AnyOptions {
  static constexpr uint32_t kMust = kAlways | set_of(Result::model_input);
  static constexpr uint32_t kMay = GuidedWithX0::kMay | WithHistory::kMay | set_of(Role::noise);
  static constexpr int kBlocks = 3;
};

// A step with a variance that the model returns. It may have noise from the caller, and may return the predicted clean
// sample.
struct LearnedVariance : AnyOptions {
  static constexpr uint32_t kMust = kAlways | set_of(Role::model_variance);
  static constexpr uint32_t kMay = kMust | set_of(Role::noise, Result::x0_out);
  static constexpr int kBlocks = 4;
  static constexpr bool kEight = true;
};

// Whether a call has a tensor or a factor. A member of kMust, or one that is not in kMay, is not tested at run time.
template <class Options, class Which>
DDPM_HD bool has(const StepCall& call, Which which) {
  if ((Options::kMust & bit(which)) != 0) return true;
  return (Options::kMay & bit(which)) != 0 && call[which].data != nullptr;
}

// Whether the kernel with these options accepts a call.
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
