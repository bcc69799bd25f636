#include "core/forward.h"
#include "ops/checks.h"
#include "ops/fill_call.h"
#include "ops/operators.h"
#include "ops/result_memory.h"
#include "ops/run_on_device.h"

namespace ddpm_ext {
namespace {

// k0 x + k1 y. Error messages use the names that the operators give to x and y.
Tensor run_affine(const char* op, const char* x_name, const Tensor& x, const char* y_name, const Tensor& y,
                  const Rows& rows) {
  ElementwiseCall call;
  call.x.dtype = call.out.dtype = check_sample(op, x_name, x);
  call.noise.dtype = check_same_or_lower(op, y_name, y, x_name, x);
  call.batch = x.size(0);
  call.noise_kind = Noise::given;
  set_table(op, call, rows, sizeof(AffineRow) / sizeof(float), x.device());
  const Tensor result = empty_result_like(x, x.scalar_type());
  bind(op, call, {{&x, &call.x}, {&y, &call.noise}}, result, call.out);
  DDPM_RUN(affine, call, x.device());
  return result;
}

}  // namespace

Tensor predict_start(const Tensor& x_t, const Tensor& noise, const Rows& rows) {
  return run_affine("predict_start", "x_t", x_t, "noise", noise, rows);
}

Tensor posterior_mean(const Tensor& x_start, const Tensor& x_t, const Rows& rows) {
  return run_affine("posterior_mean", "x_start", x_start, "x_t", x_t, rows);
}

}  // namespace ddpm_ext
