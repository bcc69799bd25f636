#include <ATen/ops/empty.h>

#include <cmath>

#include "core/spread.h"
#include "ops/checks.h"
#include "ops/fill_call.h"
#include "ops/operators.h"
#include "ops/run_on_device.h"

namespace ddpm_ext {

Tensor output_scale(const Tensor& model_output, const Tensor& uncond_output, double guidance, double rescale) {
  constexpr const char* op = "output_scale";
  OutputScaleCall call;
  call.model_output.dtype = check_sample(op, "model_output", model_output);
  call.uncond_output.dtype = check_same(op, "uncond_output", uncond_output, "model_output", model_output);
  CHECK_VALUE(std::isfinite(guidance), "guidance", " is ", guidance, ", expected a finite number");
  CHECK_VALUE(0 <= rescale && rescale <= 1, "rescale", " is ", rescale, ", expected 0 <= rescale <= 1");
  bind(op, call, Order::logical, {{&uncond_output, &call.uncond_output}}, model_output, call.model_output);
  CHECK_VALUE(call.numel > 1 || call.batch == 0, "model_output", " has shape ", model_output.sizes(),
              ", expected samples of two elements or more");
  call.guidance = static_cast<float>(guidance);
  call.rescale = rescale;
  const auto like = at::TensorOptions().device(model_output.device());
  const Tensor scale = at::empty({call.batch}, like.dtype(at::kFloat));
  if (call.batch == 0) return scale;
  const Tensor chunks = at::empty({call.batch, loss_chunks(call.numel), 2, 2}, like.dtype(at::kDouble));
  call.chunks = static_cast<ChunkMoments*>(chunks.mutable_data_ptr());
  call.scale = scale.mutable_data_ptr<float>();
  DDPM_RUN(output_scale, call, model_output.device());
  return scale;
}

}  // namespace ddpm_ext
