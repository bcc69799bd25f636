#include "core/step.h"
#include "ops/checks.h"
#include "ops/fill_call.h"
#include "ops/operators.h"
#include "ops/result_memory.h"
#include "ops/run_on_device.h"

namespace ddpm_ext {
namespace {

constexpr const char* op = "reverse_step";

// Checks all arguments except the model's output and the clip, and sets the fields of the call that come from them.
void begin(ReverseStepCall& call, const Tensor& x_t, const Rows& rows, const NoiseSource& source,
           const OptionalTensor& out) {
  set_step(op, call, call.x, call.noise, call.out, x_t, rows, source);
  if (out.has_value())
    check_out(op, *out, "x_t", x_t,
              {&x_t, pointer(source.noise), &rows.table, pointer(rows.t), pointer(source.rng.sample_ids),
               pointer(source.rng.seed), pointer(source.rng.draw_data)});
}

}  // namespace

void check_reverse_step(const Tensor& x_t, const Rows& rows, const NoiseSource& source, const OptionalTensor& out) {
  ReverseStepCall call;
  begin(call, x_t, rows, source, out);
}

Tensor reverse_step(const Tensor& x_t, const Tensor& model_output, const Rows& rows, double clip_min, double clip_max,
                    const NoiseSource& source, const OptionalTensor& out) {
  ReverseStepCall call;
  begin(call, x_t, rows, source, out);
  set_host_row(call, rows);
  call.model_output.dtype = check_same_or_lower(op, "model_output", model_output, "x_t", x_t);
  if (out.has_value()) check_overlap(op, "out", *out, model_output);
  set_clip(op, call, clip_min, clip_max);
  const Tensor result = out.has_value() ? *out : empty_result_like(x_t, x_t.scalar_type());
  bind(op, call, order_of(call),
       {{&x_t, &call.x}, {&model_output, &call.model_output}, {pointer(source.noise), &call.noise}}, result, call.out);
  DDPM_RUN(reverse_step, call, x_t.device());
  return finish(result, out);
}

}  // namespace ddpm_ext
