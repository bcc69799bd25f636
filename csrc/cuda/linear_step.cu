#include "cuda/operators.h"
#include "cuda/steps_with_options.cuh"

namespace ddpm_ext::cuda {
namespace {

// What a loop without guidance has: the model's output, and history.
struct WithHistory : AnyOptions<LinearStep> {
  using Role = LinearStep::Role;
  using Result = LinearStep::Result;
  static constexpr uint32_t kMust = set_of<LinearStep>(Role::x_t, Role::model_output, Result::out);
  static constexpr uint32_t kMay =
      kMust | set_of<LinearStep>(Role::history1, Role::history2, Role::history3, Result::history_out);
  static constexpr int kBlocks = 3;
  static constexpr bool kWords = true;
};

}  // namespace

void linear_step(const StepCall<LinearStep>& call, int device) { step_with_options<WithHistory>(call, device); }

}  // namespace ddpm_ext::cuda
