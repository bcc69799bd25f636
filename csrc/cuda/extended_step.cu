#include "cuda/operators.h"
#include "cuda/steps_with_options.cuh"

namespace ddpm_ext::cuda {
namespace {

using Any = AnyOptions<ExtendedStep>;
using Role = ExtendedStep::Role;
using Result = ExtendedStep::Result;
using Factor = ExtendedStep::Factor;

template <class... Each>
constexpr uint32_t set_of(Each... each) {
  return cuda::set_of<ExtendedStep>(each...);
}

// Classifier-free guidance. A loop that calls its model once for both halves has the copy.
struct Guided : Any {
  static constexpr uint32_t kMust = set_of(Role::x_t, Role::model_output, Role::uncond_output, Result::out);
  static constexpr uint32_t kMay = kMust | set_of(Result::out_copy, Factor::output_scale);
  static constexpr int kBlocks = 4;
  static constexpr bool kWords = true;
  static constexpr bool kSettings = false;
};

// The predicted clean sample as a result, and that of the step before.
struct WithX0 : Any {
  static constexpr uint32_t kMust = set_of(Role::x_t, Role::model_output, Result::out, Result::x0_out);
  static constexpr uint32_t kMay = kMust | set_of(Role::history, Role::uncond_output, Result::out_copy);
  static constexpr int kBlocks = 4;
  static constexpr bool kWords = true;
  static constexpr bool kSettings = false;
};

// A variance that the model returns. It is behind the output, so samples off alignment begin elsewhere in both halves
// than the others, and words would not serve.
struct LearnedVariance : Any {
  static constexpr uint32_t kMust = set_of(Role::x_t, Role::model_output, Role::model_variance, Result::out);
  static constexpr uint32_t kMay = kMust | set_of(Role::noise, Result::x0_out);
  static constexpr int kBlocks = 4;
};

}  // namespace

void extended_step(const StepCall<ExtendedStep>& call, int device) {
  step_with_options<Guided, WithX0, LearnedVariance>(call, device);
}

}  // namespace ddpm_ext::cuda
