// The arguments of the step with options, as enums generated from the list in core/step_inputs.def.
#pragma once

#include "core/scalar.h"
#include "core/step_inputs.def"

#define DDPM_NONE(...)
// Each of these macros applies the macro X to the list's entries of one kind, and DDPM_NONE to the others.
#define DDPM_LIKE_X(X) DDPM_STEP_INPUTS(X, DDPM_NONE, DDPM_NONE, DDPM_NONE, DDPM_NONE)
#define DDPM_OF_MODEL(X) DDPM_STEP_INPUTS(DDPM_NONE, X, DDPM_NONE, DDPM_NONE, DDPM_NONE)
#define DDPM_PER_SAMPLE(X) DDPM_STEP_INPUTS(DDPM_NONE, DDPM_NONE, X, DDPM_NONE, DDPM_NONE)
#define DDPM_FLAGS(X) DDPM_STEP_INPUTS(DDPM_NONE, DDPM_NONE, DDPM_NONE, X, DDPM_NONE)
#define DDPM_RESULTS(X) DDPM_STEP_INPUTS(DDPM_NONE, DDPM_NONE, DDPM_NONE, DDPM_NONE, X)

// Macros to pass as X.
#define DDPM_NAME(name, ...) name,
#define DDPM_QUOTED_NAME(name, ...) #name,
#define DDPM_BOOL(name, value) bool name = k##value;

namespace ddpm_ext {

constexpr bool kTrue = true, kFalse = false;  // for DDPM_BOOL: the list has a schema's True and False

// The tensors that a step reads: first those with the dtype of x_t, then those with the dtype of model_output.
enum class Role : int { x_t, noise, DDPM_LIKE_X(DDPM_NAME) model_output, DDPM_OF_MODEL(DDPM_NAME) count };
// The tensors that a step writes. `out` is the next sample.
enum class Result : int { out, DDPM_RESULTS(DDPM_NAME) count };
// The per-sample factors.
enum class Factor : int { DDPM_PER_SAMPLE(DDPM_NAME) count };

constexpr const char* kRoleNames[] = {"x_t", "noise", DDPM_LIKE_X(DDPM_QUOTED_NAME) "model_output",
                                      DDPM_OF_MODEL(DDPM_QUOTED_NAME)};
constexpr const char* kResultNames[] = {"out", DDPM_RESULTS(DDPM_QUOTED_NAME)};
constexpr const char* kFactorNames[] = {DDPM_PER_SAMPLE(DDPM_QUOTED_NAME)};

constexpr int kRoles = static_cast<int>(Role::count);
constexpr int kResults = static_cast<int>(Result::count);
constexpr int kFactors = static_cast<int>(Factor::count);
constexpr int kLikeX = static_cast<int>(Role::model_output);  // the number of roles with the dtype of x_t

DDPM_HD constexpr bool of_model(Role role) { return role >= Role::model_output; }

// How a step gets its standard deviation. of_row: from the row alone. log: model_variance is the v of exp(l0 + l1 v).
// direct: model_variance is the variance.
enum class Variance : int { of_row, log, direct };

// The values that all elements of a sample share. The row is a separate argument of take_step.
struct StepSample {
  float clip_min, clip_max;
  float factors[kFactors];
  Variance variance;

  DDPM_HD float operator[](Factor factor) const { return factors[static_cast<int>(factor)]; }
};

}  // namespace ddpm_ext
