#include "ops/options.h"
#include "ops/run_on_device.h"

namespace ddpm_ext {

void extended_step(const Given<ExtendedStep>& given, const Tensor& table, const OptionalTensor& t, int64_t t_index,
                   double clip_min, double clip_max, const OptionalTensor& noise, bool draw_noise, const Rng& rng) {
  using Role = ExtendedStep::Role;
  constexpr const char* op = "extended_step";
  const Tensor& x_t = *given[Role::x_t];
  StepCall<ExtendedStep> call;
  fill_step(op, call, given, {x_t, table, t, t_index, noise, draw_noise, rng}, clip_min, clip_max, [&] {
    const bool known = given[Role::known] != nullptr, mask = given[Role::mask] != nullptr;
    CHECK_VALUE(known || !mask, "mask", " is given without known, expected both");
    CHECK_VALUE(mask || !known, "known", " is given without mask, expected both");
  });
  if (given[Role::model_variance] != nullptr)
    call.settings.variance = given.flags.log_variance ? Variance::log : Variance::direct;
  DDPM_RUN(extended_step, call, x_t.device());
  finish(given);
}

}  // namespace ddpm_ext
