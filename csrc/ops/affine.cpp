// The operators that are affine in two tensors: the forward process, the predicted clean sample and the posterior mean.
#include "core/forward.h"
#include "ops/checks.h"
#include "ops/fill_call.h"
#include "ops/operators.h"
#include "ops/result_memory.h"
#include "ops/run_on_device.h"

namespace ddpm_ext {
namespace {

// Checks x, and sets the call's fields for x and the table. Error messages call the tensor x_name.
void begin(const char* op, ElementwiseCall& call, const char* x_name, const Tensor& x, const Rows& rows) {
  call.x.dtype = call.out.dtype = check_sample(op, x_name, x);
  call.batch = x.size(0);
  set_table(op, call, rows, sizeof(AffineRow) / sizeof(float), x.device());
}

// Returns k0 x + k1 y. Error messages call the tensors x_name and y_name.
Tensor run_affine(const char* op, const char* x_name, const Tensor& x, const char* y_name, const Tensor& y,
                  const Rows& rows) {
  ElementwiseCall call;
  begin(op, call, x_name, x, rows);
  call.noise.dtype = check_same_or_lower(op, y_name, y, x_name, x);
  call.noise_kind = Noise::given;
  const Tensor result = empty_result_like(x, x.scalar_type());
  bind(op, call, order_of(call), {{&x, &call.x}, {&y, &call.noise}}, result, call.out);
  DDPM_RUN(affine, call, x.device());
  return result;
}

// Returns the noised samples, which are in `out` if the caller passes it. If `drawn` is not null, the drawn noise is
// written to that tensor.
Tensor run_forward(const Tensor& x_start, const Rows& rows, const NoiseSource& source, const OptionalTensor& out,
                   const Tensor* drawn) {
  constexpr const char* op = "forward_process";
  const Tensor* noise = pointer(source.noise);
  ElementwiseCall call;
  begin(op, call, "x_start", x_start, rows);
  set_noise(op, call, call.noise, x_start, "x_start", source);
  if (out.has_value())
    check_out(op, *out, "x_start", x_start,
              {&x_start, noise, &rows.table, pointer(rows.t), pointer(source.rng.sample_ids), pointer(source.rng.seed),
               pointer(source.rng.draw_data)});
  const Tensor result = out.has_value() ? *out : empty_result_like(x_start, x_start.scalar_type());
  bind(op, call, order_of(call), {{&x_start, &call.x}, {drawn != nullptr ? drawn : noise, &call.noise}}, result,
       call.out);
  DDPM_RUN(affine, call, x_start.device());
  return finish(result, out);
}

}  // namespace

Tensor predict_start(const Tensor& x_t, const Tensor& noise, const Rows& rows) {
  return run_affine("predict_start", "x_t", x_t, "noise", noise, rows);
}

Tensor posterior_mean(const Tensor& x_start, const Tensor& x_t, const Rows& rows) {
  return run_affine("posterior_mean", "x_start", x_start, "x_t", x_t, rows);
}

Tensor forward_process(const Tensor& x_start, const Rows& rows, const NoiseSource& source, const OptionalTensor& out) {
  return run_forward(x_start, rows, source, out, nullptr);
}

std::tuple<Tensor, Tensor> forward_process_and_noise(const Tensor& x_start, const Rows& rows, const Rng& rng) {
  Tensor drawn;
  if (x_start.is_cpu() && x_start.scalar_type() == at::kFloat) drawn = empty_result_like(x_start, at::kFloat);
  const Tensor x_t = run_forward(x_start, rows, {{}, true, rng}, {}, drawn.defined() ? &drawn : nullptr);
  return {x_t, drawn};
}

}  // namespace ddpm_ext
