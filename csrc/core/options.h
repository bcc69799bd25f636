// Steps with optional arguments: the extended step and the linear step. Each is a struct, `Step` below, with a list of
// its arguments (core/extras.def, core/linear.def) from which DDPM_STEP_TYPES makes its enums. The calls, the kernels
// and the checks of both are templates over that struct.
#pragma once

#include "core/scalar.h"

// The entries of a list that are of one kind, or of a few.
#define DDPM_NONE(...)
#define DDPM_LIKE_X(LIST, X) LIST(X, DDPM_NONE, DDPM_NONE, DDPM_NONE, DDPM_NONE)
#define DDPM_OF_MODEL(LIST, X) LIST(DDPM_NONE, X, DDPM_NONE, DDPM_NONE, DDPM_NONE)
#define DDPM_PER_SAMPLE(LIST, X) LIST(DDPM_NONE, DDPM_NONE, X, DDPM_NONE, DDPM_NONE)
#define DDPM_FLAGS(LIST, X) LIST(DDPM_NONE, DDPM_NONE, DDPM_NONE, X, DDPM_NONE)
#define DDPM_RESULTS(LIST, X) LIST(DDPM_NONE, DDPM_NONE, DDPM_NONE, DDPM_NONE, X)
#define DDPM_TENSORS(LIST, X) LIST(X, X, X, DDPM_NONE, X)
#define DDPM_ALL(LIST, X) LIST(X, X, X, X, X)

// What to do with an entry.
#define DDPM_NAME(name, ...) name,
#define DDPM_COMMA_NAME(name, ...) , name
#define DDPM_QUOTED_NAME(name, ...) #name,
#define DDPM_BOOL(name, ...) bool name;

// The types of a step that has the arguments of LIST:
// - Role: the tensors that it reads. Those with the dtype of x_t come first, then those with the dtype of the model's
//   output.
// - Result: the tensors that it writes. `out` is the next sample.
// - Factor: the numbers that each sample has.
#define DDPM_STEP_TYPES(LIST)                                                                                      \
  enum class Role : int {                                                                                          \
    x_t,                                                                                                           \
    noise,                                                                                                         \
    DDPM_LIKE_X(LIST, DDPM_NAME) model_output,                                                                     \
    DDPM_OF_MODEL(LIST, DDPM_NAME) count                                                                           \
  };                                                                                                               \
  enum class Result : int { out, DDPM_RESULTS(LIST, DDPM_NAME) count };                                            \
  enum class Factor : int { DDPM_PER_SAMPLE(LIST, DDPM_NAME) count };                                              \
  struct Flags {                                                                                                   \
    DDPM_FLAGS(LIST, DDPM_BOOL)                                                                                    \
  };                                                                                                               \
  static constexpr const char* kRoleNames[] = {"x_t", "noise", DDPM_LIKE_X(LIST, DDPM_QUOTED_NAME) "model_output", \
                                               DDPM_OF_MODEL(LIST, DDPM_QUOTED_NAME)};                             \
  static constexpr const char* kResultNames[] = {"out", DDPM_RESULTS(LIST, DDPM_QUOTED_NAME)};                     \
  static constexpr const char* kFactorNames[] = {DDPM_PER_SAMPLE(LIST, DDPM_QUOTED_NAME)};

namespace ddpm_ext {

template <class Step>
constexpr int kRoles = static_cast<int>(Step::Role::count);
template <class Step>
constexpr int kResults = static_cast<int>(Step::Result::count);
template <class Step>
constexpr int kFactors = static_cast<int>(Step::Factor::count);

// How many of a step's tensors have the dtype of x_t.
template <class Step>
constexpr int kLikeX = static_cast<int>(Step::Role::model_output);

template <class Role>
DDPM_HD constexpr bool of_model(Role role) {
  return role >= Role::model_output;
}

// The values, besides the row, that all elements of a sample share.
template <class Step>
struct StepSample {
  float clip_min, clip_max;
  float factors[kFactors<Step>];
  typename Step::Settings settings;

  DDPM_HD float operator[](typename Step::Factor factor) const { return factors[static_cast<int>(factor)]; }
};

}  // namespace ddpm_ext
