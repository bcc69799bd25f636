#include "ops.h"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/full.h>
#include <ATen/ops/mean.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/zeros.h>

#include <initializer_list>
#include <limits>
#include <mutex>

#include "arguments.h"
#include "core/extended.h"
#include "core/forward.h"
#include "core/loss.h"
#include "cpu/loops.h"
#include "overlap.h"
#include "pages.h"
#ifdef DDPM_EXT_WITH_CUDA
#include "cuda/launch.h"
#endif

namespace ddpm_ext {
namespace {

// Autograd must learn that a given output changed.
Tensor finish(const Tensor& result, const OptionalTensor& out) {
  if (out.has_value() && !result.is_inference()) result.unsafeGetTensorImpl()->bump_version();
  return result;
}

template <class Args, class Cpu, class Cuda>
void dispatch(const Args& args, at::Device device, Cpu cpu, [[maybe_unused]] Cuda cuda) {
  if (args.batch == 0 || args.numel == 0) return;
#ifdef DDPM_EXT_WITH_CUDA
  if (device.is_cuda()) return cuda(args, device.index());
#endif
  (void)device;
  cpu(args);
}

#ifdef DDPM_EXT_WITH_CUDA
#define DDPM_DISPATCH(function, args, device) dispatch(args, device, cpu::function, cuda::function)
#else
#define DDPM_DISPATCH(function, args, device) dispatch(args, device, cpu::function, nullptr)
#endif

// affine in two tensors x and y, whose names the three operators choose.
Tensor run_affine(const char* op, const char* x_name, const Tensor& x, const char* y_name, const Tensor& y,
                  const Tensor& table, const OptionalTensor& t, int64_t t_index) {
  Args args;
  args.x.dtype = args.out.dtype = check_sample(op, x_name, x);
  args.noise.dtype = check_same_or_lower(op, y_name, y, x_name, x);
  args.batch = x.size(0);
  args.noise_kind = Noise::given;
  set_table(op, args, table, sizeof(AffineRow) / sizeof(float), t, t_index, x.device());
  const Tensor result = in_large_pages(at::empty_like(x));
  bind(op, args, {{&x, &args.x}, {&y, &args.noise}}, result, args.out);
  DDPM_DISPATCH(affine, args, x.device());
  return result;
}

// All of a step's arguments but the model's output.
template <class Row>
void check_step(const char* op, Call& args, TensorArg& x_arg, TensorArg& noise_arg, TensorArg& out_arg,
                const Tensor& x_t, const Tensor& table, const OptionalTensor& t, int64_t t_index,
                const OptionalTensor& noise, bool draw_noise, const Rng& rng, const Tensor* out) {
  x_arg.dtype = out_arg.dtype = check_sample(op, "x_t", x_t);
  args.batch = x_t.size(0);
  set_table(op, args, table, sizeof(Row) / sizeof(float), t, t_index, x_t.device());
  set_noise(op, args, noise_arg, x_t, "x_t", noise, draw_noise, rng);
  if (out != nullptr)
    check_out(op, *out, "x_t", x_t,
              {&x_t, pointer(noise), &table, pointer(t), pointer(rng.sample_ids), pointer(rng.seed)});
}

}  // namespace

void check_reverse_step(const Tensor& x_t, const Tensor& table, const OptionalTensor& t, int64_t t_index,
                        const OptionalTensor& noise, bool draw_noise, const Rng& rng, const OptionalTensor& out) {
  Args args;
  check_step<StepRow>("reverse_step", args, args.x, args.noise, args.out, x_t, table, t, t_index, noise, draw_noise,
                      rng, pointer(out));
}

Tensor reverse_step(const Tensor& x_t, const Tensor& model_output, const Tensor& table, const OptionalTensor& t,
                    int64_t t_index, double clip_min, double clip_max, const OptionalTensor& noise, bool draw_noise,
                    const Rng& rng, const OptionalTensor& out) {
  constexpr const char* op = "reverse_step";
  Args args;
  check_step<StepRow>(op, args, args.x, args.noise, args.out, x_t, table, t, t_index, noise, draw_noise, rng,
                      pointer(out));
  args.model_output.dtype = check_same_or_lower(op, "model_output", model_output, "x_t", x_t);
  if (out.has_value()) check_overlap(op, "out", *out, model_output);
  set_clip(op, args, clip_min, clip_max);
  const Tensor result = out.has_value() ? *out : in_large_pages(at::empty_like(x_t));
  bind(op, args, {{&x_t, &args.x}, {&model_output, &args.model_output}, {pointer(noise), &args.noise}}, result,
       args.out);
  DDPM_DISPATCH(reverse_step, args, x_t.device());
  return finish(result, out);
}

void extended_step(const Tensor& x_t, const OptionalTensor& model_output, const Tensor& table, const OptionalTensor& t,
                   int64_t t_index, double clip_min, double clip_max, const OptionalTensor& noise, bool draw_noise,
                   const Rng& rng, const Extras& extras, const Tensor& out) {
  constexpr const char* op = "extended_step";
  const at::Device device = x_t.device();
  ExtendedArgs args;
  check_step<ExtendedRow>(op, args, args[Role::x], args[Role::noise], args[Result::prev], x_t, table, t, t_index, noise,
                          draw_noise, rng, nullptr);
  set_clip(op, args, clip_min, clip_max);

  // The model's dtype, whichever of its tensors tells it.
  const auto set_model_dtype = [&](DType dtype) {
    for (Role role : {Role::model_output, Role::uncond, Role::variance}) args[role].dtype = dtype;
  };
  set_model_dtype(args[Role::x].dtype);
  const char* first_name = nullptr;
  const Tensor* first = nullptr;
  const auto of_model = [&](const char* name, const OptionalTensor& given) {
    if (!given.has_value()) return;
    const DType dtype = check_same_or_lower(op, name, *given, "x_t", x_t);
    if (first == nullptr) {
      first = &*given, first_name = name;
      set_model_dtype(dtype);
    }
    CHECK_TYPE(given->scalar_type() == first->scalar_type(), name, " has dtype ", given->scalar_type(),
               ", expected that of ", first_name, ", ", first->scalar_type());
  };
  of_model("model_output", model_output);
  of_model("uncond_output", extras.uncond_output);
  of_model("model_variance", extras.model_variance);
  CHECK_VALUE(model_output.has_value() || !extras.uncond_output.has_value(), "uncond_output",
              " is given without model_output, expected both");
  CHECK_VALUE(extras.known.has_value() || !extras.mask.has_value(), "mask", " is given without known, expected both");
  CHECK_VALUE(extras.mask.has_value() || !extras.known.has_value(), "known", " is given without mask, expected both");

  check_same(op, "out", out, "x_t", x_t);
  struct Input {
    const char* name;
    const OptionalTensor& tensor;
    TensorArg* arg;
  };
  const Input like_x[] = {{"x_start", extras.x_start, &args[Role::x_start]},
                          {"history", extras.history, &args[Role::history]},
                          {"gradient", extras.gradient, &args[Role::gradient]},
                          {"known", extras.known, &args[Role::known]},
                          {"mask", extras.mask, &args[Role::mask]},
                          {"x0_out", extras.x0_out, &args[Result::x0]},
                          {"out_copy", extras.out_copy, &args[Result::copy]}};
  for (const Input& input : like_x)
    if (input.tensor.has_value()) input.arg->dtype = check_same(op, input.name, *input.tensor, "x_t", x_t);
  set_scale(op, "output_scale", args.output_scale, extras.output_scale, args, device);
  set_scale(op, "x_start_scale", args.x_start_scale, extras.x_start_scale, args, device);
  if (extras.model_variance.has_value()) args.variance_kind = extras.log_variance ? Variance::log : Variance::direct;

  // A result may take the place of what it is made from, element by element, and of nothing else.
  const Tensor* const inputs[] = {&x_t,
                                  pointer(model_output),
                                  pointer(noise),
                                  pointer(extras.uncond_output),
                                  pointer(extras.model_variance),
                                  pointer(extras.x_start),
                                  pointer(extras.history),
                                  pointer(extras.gradient),
                                  pointer(extras.known),
                                  pointer(extras.mask)};
  const Tensor* const shared[] = {&table,
                                  pointer(t),
                                  pointer(rng.sample_ids),
                                  pointer(rng.seed),
                                  pointer(extras.output_scale),
                                  pointer(extras.x_start_scale)};
  const std::pair<const char*, const Tensor*> results[] = {
      {"out", &out}, {"x0_out", pointer(extras.x0_out)}, {"out_copy", pointer(extras.out_copy)}};
  for (const auto& [name, result] : results) {
    if (result == nullptr) continue;
    CHECK_VALUE(!may_overlap_itself(*result), name, " has elements that share memory, expected one place an element");
    for (const Tensor* input : inputs)
      if (input != nullptr) check_overlap(op, name, *result, *input);
    for (const Tensor* input : shared)
      CHECK_VALUE(input == nullptr || !may_overlap(*result, *input), name,
                  " shares memory with an input, expected memory of its own");
    for (const auto& [other_name, other] : results)
      CHECK_VALUE(other == nullptr || other == result || !may_overlap(*result, *other), name, " shares memory with ",
                  other_name, ", expected memory of its own");
    if (result != &out) result->mutable_data_ptr();  // a copy of its own, where it was lazily shared
  }

  bind(op, args,
       {{&x_t, &args[Role::x]},
        {pointer(model_output), &args[Role::model_output]},
        {pointer(noise), &args[Role::noise]},
        {pointer(extras.uncond_output), &args[Role::uncond]},
        {pointer(extras.model_variance), &args[Role::variance]},
        {pointer(extras.x_start), &args[Role::x_start]},
        {pointer(extras.history), &args[Role::history]},
        {pointer(extras.gradient), &args[Role::gradient]},
        {pointer(extras.known), &args[Role::known]},
        {pointer(extras.mask), &args[Role::mask]},
        {pointer(extras.x0_out), &args[Result::x0]},
        {pointer(extras.out_copy), &args[Result::copy]}},
       out, args[Result::prev]);
  DDPM_DISPATCH(extended_step, args, device);
  for (const auto& [name, result] : results)
    if (result != nullptr) finish(*result, *result);
}

Tensor forward_process(const Tensor& x_start, const Tensor& table, const OptionalTensor& t, int64_t t_index,
                       const OptionalTensor& noise, bool draw_noise, const Rng& rng, const OptionalTensor& out) {
  constexpr const char* op = "forward_process";
  const Tensor* given = pointer(noise);
  Args args;
  args.x.dtype = args.out.dtype = check_sample(op, "x_start", x_start);
  args.batch = x_start.size(0);
  set_table(op, args, table, sizeof(AffineRow) / sizeof(float), t, t_index, x_start.device());
  set_noise(op, args, args.noise, x_start, "x_start", noise, draw_noise, rng);
  if (out.has_value())
    check_out(op, *out, "x_start", x_start,
              {&x_start, given, &table, pointer(t), pointer(rng.sample_ids), pointer(rng.seed)});
  const Tensor result = out.has_value() ? *out : in_large_pages(at::empty_like(x_start));
  bind(op, args, {{&x_start, &args.x}, {given, &args.noise}}, result, args.out);
  DDPM_DISPATCH(affine, args, x_start.device());
  return finish(result, out);
}

std::tuple<Tensor, Tensor> diffusion_loss(const Tensor& model_output, const OptionalTensor& x_start,
                                          const Tensor& table, const OptionalTensor& t, int64_t t_index, int64_t kind,
                                          double delta, const OptionalTensor& noise, const Rng& rng, int64_t reduction,
                                          bool want_slope, bool variational, bool detach_mean) {
  constexpr const char* op = "diffusion_loss";
  constexpr int64_t kMean = 0, kNone = 1;
  const at::Device device = model_output.device();
  LossArgs args;
  // The samples' dtype is that of x_start or of a given noise; where neither is there, the model's.
  const Tensor& x = x_start.has_value() ? *x_start : noise.has_value() ? *noise : model_output;
  const char* x_name = x_start.has_value() ? "x_start" : noise.has_value() ? "noise" : "model_output";
  args.x_start.dtype = args.noise.dtype = check_sample(op, x_name, x);
  CHECK_VALUE(!variational || x_start.has_value(), "x_start", " is missing, expected one beside variational");
  const bool doubled = variational && model_output.dim() > 1 && x.dim() > 1 && model_output.size(1) == 2 * x.size(1);
  const auto half = [&](const Tensor& whole, int64_t i) { return whole.narrow(1, i * x.size(1), x.size(1)); };
  const Tensor mean = doubled ? half(model_output, 0) : model_output;
  args.model_output.dtype = check_same_or_lower(op, "model_output", mean, x_name, x);
  args.variance.dtype = args.model_output.dtype;
  args.batch = x.size(0);
  set_table(op, args, table, (variational ? sizeof(VariationalRow) : sizeof(LossRow)) / sizeof(float), t, t_index,
            device);
  set_noise(op, args, args.noise, x, x_name, noise, !noise.has_value(), rng);
  CHECK_VALUE(0 <= kind && kind <= 2, "kind", " is ", kind, ", expected 0, 1 or 2");
  CHECK_VALUE(0 <= reduction && reduction <= 2, "reduction", " is ", reduction, ", expected 0, 1 or 2");
  args.kind = static_cast<Loss>(kind);
  args.variational = variational;
  args.detached = detach_mean;
  args.delta = static_cast<float>(delta);
  CHECK_VALUE(args.delta > 0, "delta", " is ", delta, ", expected delta > 0");

  const auto like = at::TensorOptions().device(device);
  const Tensor losses = at::empty({args.batch}, like.dtype(at::kFloat));
  const auto slopes = model_output.options().dtype(at::kFloat);
  const Tensor slope = want_slope ? in_large_pages(at::empty_like(model_output, slopes)) : at::empty({0}, slopes);
  Tensor variance, mean_slope = slope, variance_slope;
  if (doubled) variance = half(model_output, 1);
  if (doubled && want_slope) mean_slope = half(slope, 0), variance_slope = half(slope, 1);
  const auto given = [](const Tensor& tensor, bool is) { return is ? &tensor : nullptr; };
  bind(op, args,
       {{pointer(x_start), &args.x_start},
        {pointer(noise), &args.noise},
        {given(mean_slope, want_slope), &args.slope},
        {given(variance, doubled), &args.variance},
        {given(variance_slope, doubled && want_slope), &args.variance_slope}},
       mean, args.model_output);
  if (args.numel == 0) losses.fill_(std::numeric_limits<float>::quiet_NaN());  // the mean of nothing, as torch's
  args.per_element = 1.0 / static_cast<double>(args.numel);
  const double share = reduction == kMean ? args.per_element / static_cast<double>(args.batch) : args.per_element;
  args.slope_share = static_cast<float>(share);
  const Tensor chunks = at::empty({args.batch, loss_chunks(args.numel)}, like.dtype(at::kDouble));
  args.chunks = chunks.mutable_data_ptr<double>();
  args.loss = losses.mutable_data_ptr<float>();
  Tensor blocks_done;
  if (device.is_cuda()) {
    blocks_done = at::zeros({args.batch + 1}, like.dtype(at::kInt));
    args.blocks_done = reinterpret_cast<uint32_t*>(blocks_done.mutable_data_ptr<int32_t>());
  }
  if (reduction == kNone) {
    DDPM_DISPATCH(loss, args, device);
    return {losses, slope};
  }
  Tensor total = at::empty({}, like.dtype(at::kFloat));
  if (args.batch == 0 || args.numel == 0)  // as torch's
    total.fill_(args.batch == 0 && reduction != kMean ? 0.0f : std::numeric_limits<float>::quiet_NaN());
  args.total = total.mutable_data_ptr<float>();
  if (reduction == kMean) args.total_factor = 1.0 / static_cast<double>(args.batch);
  DDPM_DISPATCH(loss, args, device);
  return {total, slope};
}

Tensor predict_start(const Tensor& x_t, const Tensor& noise, const Tensor& table, const OptionalTensor& t,
                     int64_t t_index) {
  return run_affine("predict_start", "x_t", x_t, "noise", noise, table, t, t_index);
}

Tensor posterior_mean(const Tensor& x_start, const Tensor& x_t, const Tensor& table, const OptionalTensor& t,
                      int64_t t_index) {
  return run_affine("posterior_mean", "x_start", x_start, "x_t", x_t, table, t, t_index);
}

Tensor randn(at::IntArrayRef size, const Rng& rng, at::ScalarType dtype, at::Device device) {
  constexpr const char* op = "randn";
  Args args;
  args.out.dtype = dtype_of(op, "dtype", dtype);
  check_device(op, "device", device);
  CHECK_VALUE(!size.empty(), "shape", " is empty, expected (batch, ...)");
  for (int64_t n : size) CHECK_VALUE(n >= 0, "shape", " is ", size, ", expected sizes >= 0");
  args.batch = size[0];
  args.noise_kind = Noise::drawn;
  const Tensor result = in_large_pages(at::empty(size, at::TensorOptions().dtype(dtype).device(device)));
  set_rng(op, args, rng, result.device());  // a plain "cuda" has its index by now
  args.draw = std::max<int64_t>(args.draw, 0);
  bind(op, args, {}, result, args.out);
  DDPM_DISPATCH(randn, args, result.device());
  return result;
}

int64_t draw_seed() {
  at::Generator generator = at::detail::getDefaultCPUGenerator();
  const std::lock_guard<std::mutex> lock(generator.mutex());
  return static_cast<int64_t>(at::check_generator<at::CPUGeneratorImpl>(generator)->random64());
}

}  // namespace ddpm_ext
