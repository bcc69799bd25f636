#include "ops/eager_steps.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/record_function.h>

#include "ops/checks.h"
#include "ops/direct_call.h"

namespace ddpm_ext::eager {
Tensor reverse_step(const Tensor& x_t, const Tensor& model_output, const Tensor& table, const OptionalTensor& t,
                    int64_t t_index, double clip_min, double clip_max, const OptionalTensor& noise, bool draw_noise,
                    DDPM_RNG_PARAMETERS, const OptionalTensor& out) {
  if (out.has_value())
    refuse_grad("reverse_step", {{"x_t", x_t}, {"model_output", model_output}, {"noise", noise}, {"out", out}});
  if (needs_dispatcher("reverse_step", {{"x_t", x_t},
                                        {"model_output", model_output},
                                        {"noise", noise},
                                        {"table", table},
                                        {"t", t},
                                        {"sample_ids", sample_ids},
                                        {"out", out}})) {
    if (out.has_value()) {
      static const auto op = c10::Dispatcher::singleton()
                                 .findSchemaOrThrow("ddpm_ext::reverse_step", "out")
                                 .typed<decltype(library::reverse_step_out)>();
      Tensor result = *out;
      op.call(x_t, model_output, table, t, t_index, clip_min, clip_max, noise, draw_noise, DDPM_RNG_ARGUMENTS, result);
      return result;
    }
    static const auto op = c10::Dispatcher::singleton()
                               .findSchemaOrThrow("ddpm_ext::reverse_step", "")
                               .typed<decltype(library::reverse_step)>();
    return op.call(x_t, model_output, table, t, t_index, clip_min, clip_max, noise, draw_noise, DDPM_RNG_ARGUMENTS);
  }
  RECORD_FUNCTION("ddpm_ext::reverse_step", std::vector<c10::IValue>());
  return ddpm_ext::reverse_step(x_t, model_output, table, t, t_index, clip_min, clip_max, noise, draw_noise,
                                DDPM_RNG_STRUCT, out);
}

#define DDPM_INPUT_ARGUMENT(name) , optional(given[Role::name])
#define DDPM_FACTOR_ARGUMENT(name) , optional(given[Factor::name])
#define DDPM_FLAG_ARGUMENT(name, ...) , given.name
#define DDPM_RESULT_ARGUMENT(name, ...) , optional(given[Result::name])

void step_with_options(const StepInputs& given, const Tensor& table, const OptionalTensor& t, int64_t t_index,
                       double clip_min, double clip_max, const OptionalTensor& noise, bool draw_noise, const Rng& rng) {
  constexpr const char* name = "step_with_options";
  c10::SmallVector<Named, 32> tensors = {
      {"x_t", *given[Role::x_t]}, {"table", table}, {"t", t}, {"sample_ids", rng.sample_ids}};
  const auto add = [&](const char* const* names, at::ArrayRef<const Tensor*> each) {
    for (size_t i = 0; i < each.size(); ++i)
      if (each[i] != nullptr) tensors.emplace_back(names[i], *each[i]);
  };
  add(kRoleNames, given.inputs), add(kFactorNames, given.factors), add(kResultNames, given.results);
  refuse_grad(name, tensors, "it");
  if (needs_dispatcher(name, tensors)) {
    static const auto op = c10::Dispatcher::singleton()
                               .findSchemaOrThrow("ddpm_ext::step_with_options", "")
                               .typed<decltype(library::step_with_options)>();
    return op.call(*given[Role::x_t], optional(given[Role::model_output]), table, t, t_index, clip_min, clip_max, noise,
                   draw_noise, rng.seed, rng.seed_value, rng.sample_ids, rng.first_id, rng.stream, rng.draw,
                   rng.draw_data,
                   *given[Result::out] DDPM_STEP_INPUTS(DDPM_INPUT_ARGUMENT, DDPM_INPUT_ARGUMENT, DDPM_FACTOR_ARGUMENT,
                                                        DDPM_FLAG_ARGUMENT, DDPM_RESULT_ARGUMENT));
  }
  RECORD_FUNCTION("ddpm_ext::step_with_options", std::vector<c10::IValue>());
  ddpm_ext::step_with_options(given, table, t, t_index, clip_min, clip_max, noise, draw_noise, rng);
}

Tensor x_start_scale(const Tensor& x_t, const OptionalTensor& model_output, const OptionalTensor& table,
                     const OptionalTensor& t, int64_t t_index, double quantile, double maximum,
                     const OptionalTensor& uncond_output, const OptionalTensor& output_scale) {
  const std::initializer_list<Named> tensors = {
      {"x_t", x_t}, {"model_output", model_output},   {"table", table},
      {"t", t},     {"uncond_output", uncond_output}, {"output_scale", output_scale}};
  refuse_grad("x_start_scale", tensors, "it");
  if (needs_dispatcher("x_start_scale", tensors)) {
    static const auto op = c10::Dispatcher::singleton()
                               .findSchemaOrThrow("ddpm_ext::x_start_scale", "")
                               .typed<decltype(ddpm_ext::x_start_scale)>();
    return op.call(x_t, model_output, table, t, t_index, quantile, maximum, uncond_output, output_scale);
  }
  RECORD_FUNCTION("ddpm_ext::x_start_scale", std::vector<c10::IValue>());
  return ddpm_ext::x_start_scale(x_t, model_output, table, t, t_index, quantile, maximum, uncond_output, output_scale);
}

Tensor output_scale(const Tensor& model_output, const Tensor& uncond_output, double guidance, double rescale) {
  const std::initializer_list<Named> tensors = {{"model_output", model_output}, {"uncond_output", uncond_output}};
  refuse_grad("output_scale", tensors, "it");
  if (needs_dispatcher("output_scale", tensors)) {
    static const auto op = c10::Dispatcher::singleton()
                               .findSchemaOrThrow("ddpm_ext::output_scale", "")
                               .typed<decltype(ddpm_ext::output_scale)>();
    return op.call(model_output, uncond_output, guidance, rescale);
  }
  RECORD_FUNCTION("ddpm_ext::output_scale", std::vector<c10::IValue>());
  return ddpm_ext::output_scale(model_output, uncond_output, guidance, rescale);
}

void check_reverse_step(const Tensor& x_t, const Tensor& table, const OptionalTensor& t, int64_t t_index,
                        const OptionalTensor& noise, bool draw_noise, DDPM_RNG_PARAMETERS, const OptionalTensor& out) {
  const std::initializer_list<Named> tensors = {{"x_t", x_t}, {"noise", noise},           {"table", table},
                                                {"t", t},     {"sample_ids", sample_ids}, {"out", out}};
  if (!ddpm_ext::plain(tensors)) {
    if (out.has_value()) ddpm_ext::check_no_lazy_view("reverse_step", "out", *out);
    return ddpm_ext::check_agreement("reverse_step", tensors);
  }
  ddpm_ext::check_reverse_step(x_t, table, t, t_index, noise, draw_noise, DDPM_RNG_STRUCT, out);
}

}  // namespace ddpm_ext::eager
