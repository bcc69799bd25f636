#include "ops/library.h"

#include <ATen/ops/scalar_tensor.h>
#include <torch/library.h>

#include "ops/checks.h"

namespace ddpm_ext::library {

Tensor reverse_step(const Tensor& x_t, const Tensor& model_output, DDPM_ROWS_PARAMETERS, double clip_min,
                    double clip_max, DDPM_SOURCE_PARAMETERS) {
  return ddpm_ext::reverse_step(x_t, model_output, DDPM_ROWS, clip_min, clip_max, DDPM_SOURCE, {});
}

void reverse_step_out(const Tensor& x_t, const Tensor& model_output, DDPM_ROWS_PARAMETERS, double clip_min,
                      double clip_max, DDPM_SOURCE_PARAMETERS, Tensor& out) {
  ddpm_ext::reverse_step(x_t, model_output, DDPM_ROWS, clip_min, clip_max, DDPM_SOURCE, out);
}

void step_with_options(DDPM_STEP_PARAMETERS) {
  ddpm_ext::step_with_options(DDPM_STEP_ARGUMENTS, DDPM_ROWS, clip_min, clip_max, DDPM_SOURCE);
}

Tensor forward_process(const Tensor& x_start, DDPM_ROWS_PARAMETERS, DDPM_SOURCE_PARAMETERS) {
  return ddpm_ext::forward_process(x_start, DDPM_ROWS, DDPM_SOURCE, {});
}

void forward_process_out(const Tensor& x_start, DDPM_ROWS_PARAMETERS, DDPM_SOURCE_PARAMETERS, Tensor& out) {
  ddpm_ext::forward_process(x_start, DDPM_ROWS, DDPM_SOURCE, out);
}

template <auto* kAffine>
Tensor affine(const Tensor& x, const Tensor& y, DDPM_ROWS_PARAMETERS) {
  return kAffine(x, y, DDPM_ROWS);
}

Tensor randn(at::IntArrayRef size, DDPM_RNG_PARAMETERS, at::ScalarType dtype, at::Device device) {
  return ddpm_ext::randn(size, DDPM_RNG, dtype, device);
}

std::tuple<Tensor, Tensor> diffusion_loss(const Tensor& model_output, const OptionalTensor& x_start,
                                          DDPM_ROWS_PARAMETERS, int64_t kind, double delta, const OptionalTensor& noise,
                                          DDPM_RNG_PARAMETERS, int64_t reduction, bool want_slope, bool variational,
                                          bool detach_mean) {
  return ddpm_ext::diffusion_loss(model_output, x_start, DDPM_ROWS, kind, delta, noise, DDPM_RNG, reduction, want_slope,
                                  variational, detach_mean, false);
}

Tensor draw_seed() { return at::scalar_tensor(ddpm_ext::draw_seed(), at::kLong); }

}  // namespace ddpm_ext::library

#define DDPM_RNG_SCHEMA                                                                                          \
  "Tensor? seed=None, SymInt seed_value=0, Tensor? sample_ids=None, SymInt first_id=0, SymInt stream=0, SymInt " \
  "draw=-1, Tensor? draw_data=None"

#define DDPM_INPUT_SCHEMA(name) ", Tensor? " #name "=None"
#define DDPM_FLAG_SCHEMA(name, default) ", bool " #name "=" #default
#define DDPM_RESULT_SCHEMA(name, letter) ", Tensor(" #letter "!)? " #name "=None"
TORCH_LIBRARY(ddpm_ext, m) {
  m.def(
      "reverse_step(Tensor x_t, Tensor model_output, Tensor table, Tensor? t, SymInt t_index, float clip_min, "
      "float clip_max, Tensor? noise, bool draw_noise, " DDPM_RNG_SCHEMA ") -> Tensor");
  m.def(
      "reverse_step.out(Tensor x_t, Tensor model_output, Tensor table, Tensor? t, SymInt t_index, float clip_min, "
      "float clip_max, Tensor? noise, bool draw_noise, " DDPM_RNG_SCHEMA ", *, Tensor(a!) out) -> ()");
  m.def(
      "step_with_options(Tensor x_t, Tensor? model_output, Tensor table, Tensor? t, SymInt t_index, float clip_min, "
      "float clip_max, Tensor? noise, bool draw_noise, " DDPM_RNG_SCHEMA ", *, Tensor(a!) out" DDPM_STEP_INPUTS(
          DDPM_INPUT_SCHEMA, DDPM_INPUT_SCHEMA, DDPM_INPUT_SCHEMA, DDPM_FLAG_SCHEMA, DDPM_RESULT_SCHEMA) ") -> ()");
  m.def(
      "forward_process(Tensor x_start, Tensor table, Tensor? t, SymInt t_index, Tensor? noise, bool "
      "draw_noise, " DDPM_RNG_SCHEMA ") -> Tensor");
  m.def(
      "forward_process.out(Tensor x_start, Tensor table, Tensor? t, SymInt t_index, Tensor? noise, bool "
      "draw_noise, " DDPM_RNG_SCHEMA ", *, Tensor(a!) out) -> ()");
  m.def("predict_start(Tensor x_t, Tensor noise, Tensor table, Tensor? t, SymInt t_index) -> Tensor");
  m.def("posterior_mean(Tensor x_start, Tensor x_t, Tensor table, Tensor? t, SymInt t_index) -> Tensor");
  m.def("randn(SymInt[] size, " DDPM_RNG_SCHEMA ", *, ScalarType dtype, Device device) -> Tensor");
  m.def(
      "diffusion_loss(Tensor model_output, Tensor? x_start, Tensor table, Tensor? t, SymInt t_index, int kind, float "
      "delta, Tensor? noise, " DDPM_RNG_SCHEMA
      ", *, int reduction=0, bool want_slope=False, bool "
      "variational=False, bool detach_mean=False) -> (Tensor, Tensor)");
  m.def(
      "x_start_scale(Tensor x_t, Tensor? model_output, Tensor? table, Tensor? t, SymInt t_index, float quantile, float "
      "maximum, Tensor? uncond_output, Tensor? output_scale) -> Tensor");
  m.def("output_scale(Tensor model_output, Tensor uncond_output, float guidance, float rescale) -> Tensor");
  m.def("draw_seed() -> Tensor", {at::Tag::nondeterministic_seeded});
}

// Registers the operators for one device. An operator is the same function for all devices, and checks the device of
// its arguments.
static void register_kernels(torch::Library& m) {
  m.impl("reverse_step", ddpm_ext::library::reverse_step);
  m.impl("reverse_step.out", ddpm_ext::library::reverse_step_out);
  m.impl("step_with_options", ddpm_ext::library::step_with_options);
  m.impl("forward_process", ddpm_ext::library::forward_process);
  m.impl("forward_process.out", ddpm_ext::library::forward_process_out);
  m.impl("diffusion_loss", ddpm_ext::library::diffusion_loss);
  m.impl("x_start_scale", ddpm_ext::x_start_scale);
  m.impl("output_scale", ddpm_ext::output_scale);
  m.impl("predict_start", ddpm_ext::library::affine<ddpm_ext::predict_start>);
  m.impl("posterior_mean", ddpm_ext::library::affine<ddpm_ext::posterior_mean>);
}

// Clones inputs that are negated views, whose values torch negates when it reads them. Such views need this function in
// operators that write to an argument and return nothing: torch's own handling assumes that an operator returns the
// tensor that it writes. Raises ValueError if an argument that the operator writes to is a negated view.
static void resolve_inputs(const c10::OperatorHandle& op, c10::DispatchKeySet keys, torch::jit::Stack* stack) {
  const auto& arguments = op.schema().arguments();
  const std::string name = op.schema().name().substr(sizeof("ddpm_ext::") - 1);
  const size_t first = stack->size() - arguments.size();
  for (size_t i = 0; i < arguments.size(); ++i) {
    c10::IValue& value = (*stack)[first + i];
    if (!value.isTensor()) continue;
    const at::Tensor tensor = value.toTensor();
    if (!tensor.is_neg()) continue;
    if (arguments[i].alias_info() != nullptr)
      ddpm_ext::check_not_negated(name.c_str(), arguments[i].name().c_str(), tensor);
    value = tensor.clone();
  }
  op.redispatchBoxed(keys & c10::DispatchKeySet(c10::DispatchKeySet::FULL_AFTER, c10::DispatchKey::Negative), stack);
}

TORCH_LIBRARY_IMPL(ddpm_ext, Negative, m) {
  for (const char* name : {"reverse_step.out", "step_with_options", "forward_process.out"})
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&resolve_inputs>());
}
TORCH_LIBRARY_IMPL(ddpm_ext, CPU, m) { register_kernels(m); }
TORCH_LIBRARY_IMPL(ddpm_ext, CUDA, m) { register_kernels(m); }
TORCH_LIBRARY_IMPL(ddpm_ext, CompositeExplicitAutograd, m) {  // a call may have no tensor to select a device by
  m.impl("randn", ddpm_ext::library::randn);
  m.impl("draw_seed", ddpm_ext::library::draw_seed);
}
