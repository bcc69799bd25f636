#include "ops/options.h"
#include "ops/run_on_device.h"

namespace ddpm_ext {

void linear_step(const Given<LinearStep>& given, const Tensor& table, const OptionalTensor& t, int64_t t_index,
                 double clip_min, double clip_max, const OptionalTensor& noise, bool draw_noise, const Rng& rng) {
  const Tensor& x_t = *given[LinearStep::Role::x_t];
  StepCall<LinearStep> call;
  fill_step("linear_step", call, given, {x_t, table, t, t_index, noise, draw_noise, rng}, clip_min, clip_max, [] {});
  DDPM_RUN(linear_step, call, x_t.device());
  finish(given);
}

}  // namespace ddpm_ext
