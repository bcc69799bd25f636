#include "core/extended.h"

#include <utility>

#include "ops/checks.h"
#include "ops/fill_call.h"
#include "ops/operators.h"
#include "ops/overlap.h"
#include "ops/run_on_device.h"

namespace ddpm_ext {
namespace {

constexpr const char* op = "extended_step";

// Sets the dtype of the model's tensors. The first one that is given decides, and the others must have the same.
void set_model_dtypes(ExtendedCall& call, const Tensor& x_t, const OptionalTensor& model_output, const Extras& extras) {
#define DDPM_NAMED(name) {#name, pointer(extras.name)},
  const std::pair<const char*, const Tensor*> tensors[] = {{"model_output", pointer(model_output)},
                                                           DDPM_EXTRAS_OF_MODEL(DDPM_NAMED)};
#undef DDPM_NAMED
  DType dtype = call[Role::x_t].dtype;
  const char* first_name = nullptr;
  const Tensor* first = nullptr;
  for (const auto& [name, tensor] : tensors) {
    if (tensor == nullptr) continue;
    const DType own = check_same_or_lower(op, name, *tensor, "x_t", x_t);
    if (first == nullptr) first = tensor, first_name = name, dtype = own;
    CHECK_TYPE(tensor->scalar_type() == first->scalar_type(), name, " has dtype ", tensor->scalar_type(),
               ", expected that of ", first_name, ", ", first->scalar_type());
  }
  for (int role = 0; role < kRoles; ++role)
    if (of_model(static_cast<Role>(role))) call.inputs[role].dtype = dtype;
}

// Checks that each result has memory of its own. It may share memory only with a tensor that it is computed from
// element by element, and then at the same places.
void check_results(const StepArguments& arguments, const OptionalTensor& model_output, const Extras& extras,
                   const Tensor& out) {
#define DDPM_POINTER(name, ...) pointer(extras.name),
#define DDPM_NAMED(name, ...) {#name, pointer(extras.name)},
  const Tensor* const elementwise[] = {&arguments.x_t, pointer(model_output), pointer(arguments.noise),
                                       DDPM_EXTRAS_INPUTS(DDPM_POINTER)};
  const Tensor* const others[] = {&arguments.table, pointer(arguments.t), pointer(arguments.rng.sample_ids),
                                  pointer(arguments.rng.seed), DDPM_EXTRAS_PER_SAMPLE(DDPM_POINTER)};
  const std::pair<const char*, const Tensor*> results[] = {{"out", &out}, DDPM_EXTRAS_RESULTS(DDPM_NAMED)};
#undef DDPM_POINTER
#undef DDPM_NAMED
  for (const auto& [name, result] : results) {
    if (result == nullptr) continue;
    CHECK_VALUE(!may_overlap_itself(*result), name, " has elements that share memory, expected one place an element");
    for (const Tensor* input : elementwise)
      if (input != nullptr) check_overlap(op, name, *result, *input);
    for (const Tensor* input : others)
      CHECK_VALUE(input == nullptr || !may_overlap(*result, *input), name,
                  " shares memory with an input, expected memory of its own");
    for (const auto& [other_name, other] : results)
      CHECK_VALUE(other == nullptr || other == result || !may_overlap(*result, *other), name, " shares memory with ",
                  other_name, ", expected memory of its own");
    if (result != &out) result->mutable_data_ptr();  // gives it memory of its own if it was lazily shared
  }
}

}  // namespace

void extended_step(const Tensor& x_t, const OptionalTensor& model_output, const Tensor& table, const OptionalTensor& t,
                   int64_t t_index, double clip_min, double clip_max, const OptionalTensor& noise, bool draw_noise,
                   const Rng& rng, const Extras& extras, const Tensor& out) {
  const StepArguments arguments = {x_t, table, t, t_index, noise, draw_noise, rng};
  ExtendedCall call;
  set_step(op, call, call[Role::x_t], call[Role::noise], call[Result::out], sizeof(ExtendedRow) / sizeof(float),
           arguments);
  set_clip(op, call, clip_min, clip_max);
  set_model_dtypes(call, x_t, model_output, extras);
  CHECK_VALUE(model_output.has_value() || !extras.uncond_output.has_value(), "uncond_output",
              " is given without model_output, expected both");
  CHECK_VALUE(extras.known.has_value() || !extras.mask.has_value(), "mask", " is given without known, expected both");
  CHECK_VALUE(extras.mask.has_value() || !extras.known.has_value(), "known", " is given without mask, expected both");

  check_same(op, "out", out, "x_t", x_t);
#define DDPM_LIKE_X(name) \
  if (extras.name.has_value()) call[Role::name].dtype = check_same(op, #name, *extras.name, "x_t", x_t);
#define DDPM_RESULT(name, letter) \
  if (extras.name.has_value()) call[Result::name].dtype = check_same(op, #name, *extras.name, "x_t", x_t);
#define DDPM_PER_SAMPLE(name) set_per_sample(op, #name, call.name, extras.name, call, x_t.device());
  DDPM_EXTRAS_LIKE_X(DDPM_LIKE_X)
  DDPM_EXTRAS_RESULTS(DDPM_RESULT)
  DDPM_EXTRAS_PER_SAMPLE(DDPM_PER_SAMPLE)
#undef DDPM_LIKE_X
#undef DDPM_RESULT
#undef DDPM_PER_SAMPLE
  if (extras.model_variance.has_value()) call.variance_kind = extras.log_variance ? Variance::log : Variance::direct;
  check_results(arguments, model_output, extras, out);

#define DDPM_INPUT(name) {pointer(extras.name), &call[Role::name]},
#define DDPM_RESULT(name, letter) {pointer(extras.name), &call[Result::name]},
  bind(op, call,
       {{&x_t, &call[Role::x_t]},
        {pointer(model_output), &call[Role::model_output]},
        {pointer(noise), &call[Role::noise]},
        DDPM_EXTRAS_INPUTS(DDPM_INPUT) DDPM_EXTRAS_RESULTS(DDPM_RESULT)},
       out, call[Result::out]);
#undef DDPM_INPUT
#undef DDPM_RESULT
  DDPM_RUN(extended_step, call, x_t.device());

  finish(out, out);
#define DDPM_FINISH(name, letter) \
  if (extras.name.has_value()) finish(*extras.name, extras.name);
  DDPM_EXTRAS_RESULTS(DDPM_FINISH)
#undef DDPM_FINISH
}

}  // namespace ddpm_ext
