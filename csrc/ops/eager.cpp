#include "ops/eager.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/record_function.h>

#include "ops/checks.h"
#include "ops/direct_call.h"
#include "ops/library.h"

// An operator of the dispatcher, which is looked up once.
#define DDPM_OPERATOR(name, overload, ...)                                                                \
  [] {                                                                                                    \
    static const auto op =                                                                                \
        c10::Dispatcher::singleton().findSchemaOrThrow("ddpm_ext::" name, overload).typed<__VA_ARGS__>(); \
    return op;                                                                                            \
  }()
#define DDPM_NAMED_RNG(rng) \
  {"sample_ids", rng.sample_ids}, {"seed", rng.seed}, { "draw", rng.draw_data }
#define DDPM_RECORD(name) RECORD_FUNCTION("ddpm_ext::" name, std::vector<c10::IValue>())

namespace ddpm_ext::eager {

Tensor reverse_step(const Tensor& x_t, const Tensor& model_output, const Rows& rows, double clip_min, double clip_max,
                    const NoiseSource& source, const OptionalTensor& out) {
  const std::initializer_list<Named> tensors = {
      {"x_t", x_t},  {"model_output", model_output}, {"noise", source.noise}, {"out", out}, {"table", rows.table},
      {"t", rows.t}, DDPM_NAMED_RNG(source.rng)};
  if (out.has_value()) refuse_grad("reverse_step", tensors);
  if (needs_dispatcher("reverse_step", tensors)) {
    if (!out.has_value())
      return DDPM_OPERATOR("reverse_step", "", decltype(library::reverse_step))
          .call(x_t, model_output, DDPM_OF_ROWS, clip_min, clip_max, DDPM_OF_SOURCE);
    Tensor result = *out;
    DDPM_OPERATOR("reverse_step", "out", decltype(library::reverse_step_out))
        .call(x_t, model_output, DDPM_OF_ROWS, clip_min, clip_max, DDPM_OF_SOURCE, result);
    return result;
  }
  DDPM_RECORD("reverse_step");
  return ddpm_ext::reverse_step(x_t, model_output, rows, clip_min, clip_max, source, out);
}

void check_reverse_step(const Tensor& x_t, const Rows& rows, const NoiseSource& source, const OptionalTensor& out) {
  const std::initializer_list<Named> tensors = {{"x_t", x_t},  {"noise", source.noise},
                                                {"out", out},  {"table", rows.table},
                                                {"t", rows.t}, DDPM_NAMED_RNG(source.rng)};
  if (plain(tensors)) return ddpm_ext::check_reverse_step(x_t, rows, source, out);
  if (out.has_value()) {
    check_not_negated("reverse_step", "out", *out);
    dtype_of("reverse_step", "out", out->scalar_type());
  }
  check_agreement("reverse_step", tensors);
}

#define DDPM_INPUT_ARGUMENT(name) , optional(given[Role::name])
#define DDPM_FACTOR_ARGUMENT(name) , optional(given[Factor::name])
#define DDPM_FLAG_ARGUMENT(name, ...) , given.name
#define DDPM_RESULT_ARGUMENT(name, ...) , optional(given[Result::name])

void step_with_options(StepInputs given, const Rows& rows, double clip_min, double clip_max,
                       const NoiseSource& source) {
  constexpr const char* name = "step_with_options";
  given[Role::noise] = pointer(source.noise);
  c10::SmallVector<Named, 32> tensors = {{"x_t", *given[Role::x_t]}, {"table", rows.table}};
  for (const Named& each : std::initializer_list<Named>{{"t", rows.t}, DDPM_NAMED_RNG(source.rng)})
    if (each.tensor != nullptr) tensors.push_back(each);
  const auto add = [&](const char* const* names, at::ArrayRef<const Tensor*> each) {
    for (size_t i = 0; i < each.size(); ++i)
      if (each[i] != nullptr) tensors.emplace_back(names[i], *each[i]);
  };
  add(kRoleNames, given.inputs), add(kFactorNames, given.factors), add(kResultNames, given.results);
  refuse_grad(name, tensors, "it");
  if (needs_dispatcher(name, tensors))
    return DDPM_OPERATOR("step_with_options", "", decltype(library::step_with_options))
        .call(*given[Role::x_t], optional(given[Role::model_output]), DDPM_OF_ROWS, clip_min, clip_max, DDPM_OF_SOURCE,
              *given[Result::out] DDPM_STEP_INPUTS(DDPM_INPUT_ARGUMENT, DDPM_INPUT_ARGUMENT, DDPM_FACTOR_ARGUMENT,
                                                   DDPM_FLAG_ARGUMENT, DDPM_RESULT_ARGUMENT));
  DDPM_RECORD("step_with_options");
  ddpm_ext::step_with_options(given, rows, clip_min, clip_max, source);
}

Tensor x_start_scale(const Tensor& x_t, const OptionalTensor& model_output, const OptionalTensor& table,
                     const OptionalTensor& t, int64_t t_index, double quantile, double maximum,
                     const OptionalTensor& uncond_output, const OptionalTensor& output_scale) {
  const std::initializer_list<Named> tensors = {
      {"x_t", x_t}, {"model_output", model_output},   {"table", table},
      {"t", t},     {"uncond_output", uncond_output}, {"output_scale", output_scale}};
  refuse_grad("x_start_scale", tensors, "it");
  if (needs_dispatcher("x_start_scale", tensors))
    return DDPM_OPERATOR("x_start_scale", "", decltype(ddpm_ext::x_start_scale))
        .call(x_t, model_output, table, t, t_index, quantile, maximum, uncond_output, output_scale);
  DDPM_RECORD("x_start_scale");
  return ddpm_ext::x_start_scale(x_t, model_output, table, t, t_index, quantile, maximum, uncond_output, output_scale);
}

Tensor output_scale(const Tensor& model_output, const Tensor& uncond_output, double guidance, double rescale) {
  const std::initializer_list<Named> tensors = {{"model_output", model_output}, {"uncond_output", uncond_output}};
  refuse_grad("output_scale", tensors, "it");
  if (needs_dispatcher("output_scale", tensors))
    return DDPM_OPERATOR("output_scale", "", decltype(ddpm_ext::output_scale))
        .call(model_output, uncond_output, guidance, rescale);
  DDPM_RECORD("output_scale");
  return ddpm_ext::output_scale(model_output, uncond_output, guidance, rescale);
}

Tensor forward_process(const Tensor& x_start, const Rows& rows, const NoiseSource& source, const OptionalTensor& out) {
  const std::initializer_list<Named> tensors = {{"x_start", x_start}, {"noise", source.noise},
                                                {"out", out},         {"table", rows.table},
                                                {"t", rows.t},        DDPM_NAMED_RNG(source.rng)};
  if (out.has_value()) refuse_grad("forward_process", tensors);
  if (needs_dispatcher("forward_process", tensors)) {
    if (!out.has_value())
      return DDPM_OPERATOR("forward_process", "", decltype(library::forward_process))
          .call(x_start, DDPM_OF_ROWS, DDPM_OF_SOURCE);
    Tensor result = *out;
    DDPM_OPERATOR("forward_process", "out", decltype(library::forward_process_out))
        .call(x_start, DDPM_OF_ROWS, DDPM_OF_SOURCE, result);
    return result;
  }
  DDPM_RECORD("forward_process");
  return ddpm_ext::forward_process(x_start, rows, source, out);
}

std::tuple<Tensor, Tensor> forward_process_and_noise(const Tensor& x_start, const Rows& rows, const Rng& rng) {
  if (needs_dispatcher("forward_process",
                       {{"x_start", x_start}, {"table", rows.table}, {"t", rows.t}, DDPM_NAMED_RNG(rng)}))
    return {eager::forward_process(x_start, rows, {{}, true, rng}, {}), Tensor()};
  DDPM_RECORD("forward_process");
  return ddpm_ext::forward_process_and_noise(x_start, rows, rng);
}

std::tuple<Tensor, Tensor> diffusion_loss(const Tensor& model_output, const OptionalTensor& x_start, const Rows& rows,
                                          int64_t kind, double delta, const OptionalTensor& noise, const Rng& rng,
                                          int64_t reduction, bool want_slope, bool variational, bool detach_mean,
                                          bool overwrite_noise) {
  if (needs_dispatcher("diffusion_loss", {{"model_output", model_output},
                                          {"x_start", x_start},
                                          {"noise", noise},
                                          {"table", rows.table},
                                          {"t", rows.t},
                                          DDPM_NAMED_RNG(rng)}))
    return DDPM_OPERATOR("diffusion_loss", "", decltype(library::diffusion_loss))
        .call(model_output, x_start, DDPM_OF_ROWS, kind, delta, noise, DDPM_OF_RNG(rng), reduction, want_slope,
              variational, detach_mean);
  DDPM_RECORD("diffusion_loss");
  return ddpm_ext::diffusion_loss(model_output, x_start, rows, kind, delta, noise, rng, reduction, want_slope,
                                  variational, detach_mean, overwrite_noise);
}

using Affine = Tensor(const Tensor&, const Tensor&, DDPM_ROWS_PARAMETERS);

Tensor predict_start(const Tensor& x_t, const Tensor& noise, const Rows& rows) {
  if (needs_dispatcher("predict_start", {{"x_t", x_t}, {"noise", noise}, {"table", rows.table}, {"t", rows.t}}))
    return DDPM_OPERATOR("predict_start", "", Affine).call(x_t, noise, DDPM_OF_ROWS);
  DDPM_RECORD("predict_start");
  return ddpm_ext::predict_start(x_t, noise, rows);
}

Tensor posterior_mean(const Tensor& x_start, const Tensor& x_t, const Rows& rows) {
  if (needs_dispatcher("posterior_mean", {{"x_start", x_start}, {"x_t", x_t}, {"table", rows.table}, {"t", rows.t}}))
    return DDPM_OPERATOR("posterior_mean", "", Affine).call(x_start, x_t, DDPM_OF_ROWS);
  DDPM_RECORD("posterior_mean");
  return ddpm_ext::posterior_mean(x_start, x_t, rows);
}

}  // namespace ddpm_ext::eager
