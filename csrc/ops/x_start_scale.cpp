#include <ATen/ops/empty.h>

#include "core/quantile.h"
#include "core/step.h"
#include "ops/checks.h"
#include "ops/fill_call.h"
#include "ops/operators.h"
#include "ops/result_memory.h"
#include "ops/run_on_device.h"

namespace ddpm_ext {

Tensor x_start_scale(const Tensor& x_t, const OptionalTensor& model_output, const OptionalTensor& table,
                     const OptionalTensor& t, int64_t t_index, double quantile, double maximum,
                     const OptionalTensor& uncond_output, const OptionalTensor& output_scale) {
  constexpr const char* op = "x_start_scale";
  XStartScaleCall call;
  call.x.dtype = call.model_output.dtype = check_sample(op, "x_t", x_t);
  call.batch = x_t.size(0);
  CHECK_VALUE(model_output.has_value() == table.has_value(), "table", " is ", table.has_value() ? "given" : "missing",
              ", expected it together with model_output");
  if (model_output.has_value()) {
    call.model_output.dtype = check_same_or_lower(op, "model_output", *model_output, "x_t", x_t);
    set_table(op, call, {*table, t, t_index}, kRowWidth, x_t.device());
  }
  const auto with_output = [&](const char* name, const OptionalTensor& tensor) {
    CHECK_VALUE(!tensor.has_value() || model_output.has_value(), name, " is given without model_output, expected both");
  };
  with_output("uncond_output", uncond_output);
  with_output("output_scale", output_scale);
  if (uncond_output.has_value())
    call.uncond_output.dtype = check_same(op, "uncond_output", *uncond_output, "model_output", *model_output);
  set_per_sample(op, "output_scale", call.output_scale, pointer(output_scale), call, x_t.device());
  CHECK_VALUE(0 < quantile && quantile <= 1, "quantile", " is ", quantile, ", expected 0 < quantile <= 1");
  CHECK_VALUE(maximum >= 1, "maximum", " is ", maximum, ", expected at least 1");
  // A quantile does not depend on the order of the elements. If x_t is contiguous, the elements are processed in the
  // order of model_output, which may be channels_last: copying x_t through a buffer takes less time than copying
  // model_output.
  if (model_output.has_value() && x_t.is_contiguous())
    bind(op, call, Order::any, {{&x_t, &call.x}, {pointer(uncond_output), &call.uncond_output}}, *model_output,
         call.model_output);
  else
    bind(op, call, Order::any,
         {{pointer(model_output), &call.model_output}, {pointer(uncond_output), &call.uncond_output}}, x_t, call.x);
  CHECK_VALUE(call.numel > 0 || call.batch == 0, "x_t", " has shape ", x_t.sizes(), ", expected no empty samples");
  CHECK_VALUE(call.numel < int64_t{1} << 31, "a sample", " has ", call.numel, " elements, expected fewer than 2^31");
  call.rank = QuantileRank::of(quantile, call.numel);
  call.maximum = static_cast<float>(maximum);
  const auto like = at::TensorOptions().device(x_t.device()).dtype(at::kFloat);
  const Tensor scale = at::empty({call.batch}, like);
  if (call.batch == 0) return scale;
  int64_t floats = cpu::x_start_scale_scratch(call.batch, call.numel);
#ifdef DDPM_EXT_WITH_CUDA
  if (x_t.is_cuda()) floats = cuda::x_start_scale_scratch(call.batch, call.numel);
#endif
  const Tensor scratch = empty_result({floats}, like);
  call.scale = scale.mutable_data_ptr<float>();
  call.scratch = scratch.mutable_data_ptr<float>();
  DDPM_RUN(x_start_scale, call, x_t.device());
  return scale;
}

}  // namespace ddpm_ext
