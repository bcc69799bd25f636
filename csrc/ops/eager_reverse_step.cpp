#include "ops/eager_reverse_step.h"

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
