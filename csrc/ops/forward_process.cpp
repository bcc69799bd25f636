#include "core/forward.h"
#include "ops/checks.h"
#include "ops/fill_call.h"
#include "ops/operators.h"
#include "ops/result_memory.h"
#include "ops/run_on_device.h"

namespace ddpm_ext {
namespace {

// `drawn` is where drawn noise is written, or null.
Tensor run(const Tensor& x_start, const Rows& rows, const NoiseSource& source, const OptionalTensor& out,
           const Tensor* drawn) {
  constexpr const char* op = "forward_process";
  const Tensor* given = pointer(source.noise);
  ElementwiseCall call;
  call.x.dtype = call.out.dtype = check_sample(op, "x_start", x_start);
  call.batch = x_start.size(0);
  set_table(op, call, rows, sizeof(AffineRow) / sizeof(float), x_start.device());
  set_noise(op, call, call.noise, x_start, "x_start", source);
  if (out.has_value())
    check_out(
        op, *out, "x_start", x_start,
        {&x_start, given, &rows.table, pointer(rows.t), pointer(source.rng.sample_ids), pointer(source.rng.seed)});
  const Tensor result = out.has_value() ? *out : empty_result_like(x_start, x_start.scalar_type());
  bind(op, call, {{&x_start, &call.x}, {drawn != nullptr ? drawn : given, &call.noise}}, result, call.out);
  DDPM_RUN(affine, call, x_start.device());
  return finish(result, out);
}

}  // namespace

Tensor forward_process(const Tensor& x_start, const Rows& rows, const NoiseSource& source, const OptionalTensor& out) {
  return run(x_start, rows, source, out, nullptr);
}

std::tuple<Tensor, Tensor> forward_process_and_noise(const Tensor& x_start, const Rows& rows, const Rng& rng) {
  Tensor drawn;
  if (x_start.is_cpu() && x_start.scalar_type() == at::kFloat) drawn = empty_result_like(x_start, at::kFloat);
  const Tensor x_t = run(x_start, rows, {{}, true, rng}, {}, drawn.defined() ? &drawn : nullptr);
  return {x_t, drawn};
}

}  // namespace ddpm_ext
