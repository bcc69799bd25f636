// The arguments of a step with optional arguments (core/options.h), and how its call is filled from them.
#pragma once

#include <ATen/core/Tensor.h>

#include "ops/checks.h"
#include "ops/fill_call.h"
#include "ops/operators.h"
#include "ops/overlap.h"

namespace ddpm_ext {

// Sets the dtype of the model's tensors. The first one that is given decides, and the others must have the same.
template <class Step>
void set_model_dtypes(const char* op, StepCall<Step>& call, const Given<Step>& given, const Tensor& x_t) {
  using Role = typename Step::Role;
  DType dtype = call[Role::x_t].dtype;
  const char* first_name = nullptr;
  const Tensor* first = nullptr;
  for (int i = kLikeX<Step>; i < kRoles<Step>; ++i) {
    const char* name = Step::kRoleNames[i];
    const Tensor* tensor = given.inputs[i];
    if (tensor == nullptr) continue;
    const DType own = check_same_or_lower(op, name, *tensor, "x_t", x_t);
    if (first == nullptr) first = tensor, first_name = name, dtype = own;
    CHECK_TYPE(tensor->scalar_type() == first->scalar_type(), name, " has dtype ", tensor->scalar_type(),
               ", expected that of ", first_name, ", ", first->scalar_type());
  }
  for (int i = kLikeX<Step>; i < kRoles<Step>; ++i) call.inputs[i].dtype = dtype;
}

// Checks that each result has memory of its own. It may share memory only with a tensor that it is computed from
// element by element, and then at the same places.
template <class Step>
void check_results(const char* op, const Given<Step>& given, const StepArguments& arguments) {
  const Tensor* const others[] = {&arguments.table, pointer(arguments.t), pointer(arguments.rng.sample_ids),
                                  pointer(arguments.rng.seed)};
  for (int i = 0; i < kResults<Step>; ++i) {
    const char* name = Step::kResultNames[i];
    const Tensor* result = given.results[i];
    if (result == nullptr) continue;
    CHECK_VALUE(!may_overlap_itself(*result), name, " has elements that share memory, expected one place an element");
    for (const Tensor* input : given.inputs)
      if (input != nullptr) check_overlap(op, name, *result, *input);
    const auto check_apart = [&](const Tensor* input) {
      CHECK_VALUE(input == nullptr || !may_overlap(*result, *input), name,
                  " shares memory with an input, expected memory of its own");
    };
    for (const Tensor* input : others) check_apart(input);
    for (const Tensor* factor : given.factors) check_apart(factor);
    for (int j = 0; j < kResults<Step>; ++j) {
      const Tensor* other = given.results[j];
      CHECK_VALUE(other == nullptr || j == i || !may_overlap(*result, *other), name, " shares memory with ",
                  Step::kResultNames[j], ", expected memory of its own");
    }
    if (i != 0) result->mutable_data_ptr();  // gives it memory of its own if it was lazily shared
  }
}

// Fills a call and checks every argument on the way. check_more() runs between the checks of the model's tensors and
// those of the others.
template <class Step, class CheckMore>
void fill_step(const char* op, StepCall<Step>& call, const Given<Step>& given, const StepArguments& arguments,
               double clip_min, double clip_max, CheckMore check_more) {
  using Role = typename Step::Role;
  using Result = typename Step::Result;
  const Tensor& x_t = arguments.x_t;
  set_step(op, call, call[Role::x_t], call[Role::noise], call[Result::out], sizeof(typename Step::Row) / sizeof(float),
           arguments);
  set_clip(op, call, clip_min, clip_max);
  set_model_dtypes(op, call, given, x_t);
  CHECK_VALUE(given[Role::model_output] != nullptr || given[Role::uncond_output] == nullptr, "uncond_output",
              " is given without model_output, expected both");
  check_more();

  const Tensor& out = *given[Result::out];
  check_same(op, "out", out, "x_t", x_t);
  for (int i = static_cast<int>(Role::noise) + 1; i < kLikeX<Step>; ++i)
    if (given.inputs[i] != nullptr)
      call.inputs[i].dtype = check_same(op, Step::kRoleNames[i], *given.inputs[i], "x_t", x_t);
  for (int i = 1; i < kResults<Step>; ++i)
    if (given.results[i] != nullptr)
      call.results[i].dtype = check_same(op, Step::kResultNames[i], *given.results[i], "x_t", x_t);
  for (int i = 0; i < kFactors<Step>; ++i)
    set_per_sample(op, Step::kFactorNames[i], call.factors[i], given.factors[i], call, x_t.device());
  check_results(op, given, arguments);

  Bound bound[kRoles<Step> + kResults<Step> - 1];
  int count = 0;
  for (int i = 0; i < kRoles<Step>; ++i) bound[count++] = {given.inputs[i], &call.inputs[i]};
  for (int i = 1; i < kResults<Step>; ++i) bound[count++] = {given.results[i], &call.results[i]};
  bind(op, call, bound, out, call[Result::out]);
}

}  // namespace ddpm_ext
