#include <ATen/ops/empty.h>

#include <limits>

#include "core/loss.h"
#include "ops/checks.h"
#include "ops/fill_call.h"
#include "ops/operators.h"
#include "ops/result_memory.h"
#include "ops/run_on_device.h"

namespace ddpm_ext {

std::tuple<Tensor, Tensor> diffusion_loss(const Tensor& model_output, const OptionalTensor& x_start, const Rows& rows,
                                          int64_t kind, double delta, const OptionalTensor& noise, const Rng& rng,
                                          int64_t reduction, bool want_slope, bool variational, bool detach_mean,
                                          bool overwrite_noise) {
  constexpr const char* op = "diffusion_loss";
  constexpr int64_t kMean = 0, kNone = 1;
  const at::Device device = model_output.device();
  LossCall call;
  // x has the shape and dtype that the other tensors must have. (The model's output may also have a lower precision, or
  // twice the channels.) It is x_start or, if that is missing, `noise` or, if both are missing, the model's output.
  const Tensor& x = x_start.has_value() ? *x_start : noise.has_value() ? *noise : model_output;
  const char* x_name = x_start.has_value() ? "x_start" : noise.has_value() ? "noise" : "model_output";
  call.x_start.dtype = call.noise.dtype = check_sample(op, x_name, x);
  CHECK_VALUE(!variational || x_start.has_value(), "x_start", " is missing, expected a tensor with variational");
  const bool doubled = variational && model_output.dim() > 1 && x.dim() > 1 && model_output.size(1) == 2 * x.size(1);
  const auto half = [&](const Tensor& whole, int64_t i) { return whole.narrow(1, i * x.size(1), x.size(1)); };
  const Tensor mean = doubled ? half(model_output, 0) : model_output;
  call.model_output.dtype = check_same_or_lower(op, "model_output", mean, x_name, x);
  call.variance.dtype = call.model_output.dtype;
  call.batch = x.size(0);
  set_table(op, call, rows, (variational ? sizeof(VariationalRow) : sizeof(LossRow)) / sizeof(float), device);
  set_noise(op, call, call.noise, x, x_name, {noise, !noise.has_value(), rng});
  CHECK_VALUE(0 <= kind && kind <= 2, "kind", " is ", kind, ", expected 0, 1 or 2");
  CHECK_VALUE(0 <= reduction && reduction <= 2, "reduction", " is ", reduction, ", expected 0, 1 or 2");
  call.kind = static_cast<Loss>(kind);
  call.variational = variational;
  call.detached = detach_mean;
  call.delta = static_cast<float>(delta);
  CHECK_VALUE(call.delta > 0, "delta", " is ", delta, ", expected delta > 0");

  const auto like = at::TensorOptions().device(device);
  const Tensor losses = at::empty({call.batch}, like.dtype(at::kFloat));
  const auto slopes = model_output.options().dtype(at::kFloat);
  const bool reuses_noise =
      overwrite_noise && noise->sizes() == model_output.sizes() && noise->strides() == model_output.strides();
  const Tensor slope = !want_slope    ? at::empty({0}, slopes)
                       : reuses_noise ? *noise
                                      : empty_result_like(model_output, at::kFloat);
  Tensor variance, mean_slope = slope, variance_slope;
  if (doubled) variance = half(model_output, 1);
  if (doubled && want_slope) mean_slope = half(slope, 0), variance_slope = half(slope, 1);
  const auto tensor_if = [](const Tensor& tensor, bool condition) { return condition ? &tensor : nullptr; };
  bind(op, call, Order::logical,
       {{pointer(x_start), &call.x_start},
        {pointer(noise), &call.noise},
        {tensor_if(mean_slope, want_slope), &call.slope},
        {tensor_if(variance, doubled), &call.variance},
        {tensor_if(variance_slope, doubled && want_slope), &call.variance_slope}},
       mean, call.model_output);
  if (call.numel == 0) losses.fill_(std::numeric_limits<float>::quiet_NaN());  // the mean of no elements, as in torch
  call.per_element = 1.0 / static_cast<double>(call.numel);
  const double share = reduction == kMean ? call.per_element / static_cast<double>(call.batch) : call.per_element;
  call.slope_share = static_cast<float>(share);
  const Tensor chunks = at::empty({call.batch, loss_chunks(call.numel)}, like.dtype(at::kDouble));
  call.chunks = chunks.mutable_data_ptr<double>();
  call.loss = losses.mutable_data_ptr<float>();
  if (reduction == kNone) {
    DDPM_RUN(loss, call, device);
    return {losses, slope};
  }
  Tensor total = at::empty({}, like.dtype(at::kFloat));
  if (call.batch == 0 || call.numel == 0)  // there is no kernel launch: the same result as torch's losses
    total.fill_(call.batch == 0 && reduction != kMean ? 0.0f : std::numeric_limits<float>::quiet_NaN());
  call.total = total.mutable_data_ptr<float>();
  if (reduction == kMean) call.total_factor = 1.0 / static_cast<double>(call.batch);
  DDPM_RUN(loss, call, device);
  return {total, slope};
}

}  // namespace ddpm_ext
