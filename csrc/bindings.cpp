// ddpm_ext._C: the operators without the dispatcher, which costs more than a small step's arithmetic. Where the
// dispatcher has something to do (gradients, tensor subclasses, modes, function transforms), it is called.
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/grad_mode.h>
#include <ATen/record_function.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/Device.h>
#include <torch/csrc/utils/pybind.h>

#include <initializer_list>

#include "core/philox.h"
#include "cpu/loops.h"
#include "library.h"

namespace py = pybind11;
namespace library = ddpm_ext::library;
using at::Tensor;
using ddpm_ext::OptionalTensor;

namespace {

struct Named {
  const char* name;
  const Tensor* tensor;  // null: not given

  Named(const char* name, const Tensor& t) : name(name), tensor(&t) {}
  Named(const char* name, const OptionalTensor& t) : name(name), tensor(t.has_value() ? &*t : nullptr) {}
};

// Whether no mode is active and every tensor is one of the CPU's or a GPU's own, so that a kernel may be called
// directly.
bool plain(std::initializer_list<Named> tensors) {
  using c10::DispatchKey;
  using c10::DispatchKeySet;
  constexpr DispatchKeySet modes({DispatchKey::Python, DispatchKey::PythonTLSSnapshot, DispatchKey::Functionalize,
                                  DispatchKey::FuncTorchDynamicLayerFrontMode, DispatchKey::PreDispatch});
  constexpr DispatchKeySet own({DispatchKey::CPU, DispatchKey::CUDA, DispatchKey::AutogradCPU,
                                DispatchKey::AutogradCUDA, DispatchKey::ADInplaceOrView, DispatchKey::AutocastCPU,
                                DispatchKey::AutocastCUDA});
  if (c10::impl::tls_local_dispatch_key_set().included_.has_any(modes)) return false;
  for (const Named& t : tensors)
    if (t.tensor != nullptr && (t.tensor->key_set() | own) != own) return false;
  return true;
}

bool records_grad(std::initializer_list<Named> tensors) {
  if (!at::GradMode::is_enabled()) return false;
  for (const Named& t : tensors)
    if (t.tensor != nullptr && t.tensor->requires_grad()) return true;
  return false;
}

// The dispatcher would drop a tangent without a word.
void refuse_forward_mode(const char* op, std::initializer_list<Named> tensors) {
  for (const Named& t : tensors) {
    if (t.tensor == nullptr || t.tensor->unsafeGetTensorImpl()->autograd_meta() == nullptr) continue;
    TORCH_CHECK_NOT_IMPLEMENTED(!t.tensor->_fw_grad(0).defined(), op, ": ", t.name,
                                " has a forward-mode derivative, expected none (backend=\"reference\" takes them)");
  }
}

// Where the dispatcher chooses the kernel, it goes by the tensors' devices and layouts: they must agree before.
void check_agreement(const char* op, std::initializer_list<Named> tensors) {
  const Tensor& first = *tensors.begin()->tensor;
  for (const Named& t : tensors) {
    if (t.tensor == nullptr) continue;
    TORCH_CHECK_VALUE(t.tensor->layout() == at::kStrided, op, ": ", t.name, " has layout ", t.tensor->layout(),
                      ", expected strided");
    TORCH_CHECK_VALUE(t.tensor->device() == first.device(), op, ": ", t.name, " is on ", t.tensor->device(),
                      ", expected the samples' device, ", first.device());
  }
}

bool needs_dispatcher(const char* op, std::initializer_list<Named> tensors) {
  refuse_forward_mode(op, tensors);
  if (plain(tensors) && !records_grad(tensors)) return false;
  check_agreement(op, tensors);
  return true;
}

void refuse_grad(const char* op, std::initializer_list<Named> tensors, const char* recorder = "out=") {
  if (!at::GradMode::is_enabled()) return;
  for (const Named& t : tensors) {
    TORCH_CHECK_VALUE(t.tensor == nullptr || !t.tensor->requires_grad(), op, ": ", t.name, " requires a gradient, but ",
                      recorder, " records no gradients, expected none");
  }
}

Tensor reverse_step(const Tensor& x_t, const Tensor& model_output, const Tensor& table, const OptionalTensor& t,
                    int64_t t_index, double clip_min, double clip_max, const OptionalTensor& noise, bool draw_noise,
                    DDPM_RNG_PARAMETERS, const OptionalTensor& out) {
  if (out.has_value())
    refuse_grad("reverse_step", {{"x_t", x_t}, {"model_output", model_output}, {"noise", noise}, {"out", out}});
  if (needs_dispatcher("reverse_step", {{"x_t", x_t},
                                        {"model_output", model_output},
                                        {"noise", noise},
                                        {"table", table},
                                        {"t", t},
                                        {"sample_ids", sample_ids},
                                        {"out", out}})) {
    if (out.has_value()) {
      static const auto op = c10::Dispatcher::singleton()
                                 .findSchemaOrThrow("ddpm_ext::reverse_step", "out")
                                 .typed<decltype(library::reverse_step_out)>();
      Tensor result = *out;
      op.call(x_t, model_output, table, t, t_index, clip_min, clip_max, noise, draw_noise, DDPM_RNG_ARGUMENTS, result);
      return result;
    }
    static const auto op = c10::Dispatcher::singleton()
                               .findSchemaOrThrow("ddpm_ext::reverse_step", "")
                               .typed<decltype(library::reverse_step)>();
    return op.call(x_t, model_output, table, t, t_index, clip_min, clip_max, noise, draw_noise, DDPM_RNG_ARGUMENTS);
  }
  RECORD_FUNCTION("ddpm_ext::reverse_step", std::vector<c10::IValue>());
  return ddpm_ext::reverse_step(x_t, model_output, table, t, t_index, clip_min, clip_max, noise, draw_noise, DDPM_RNG,
                                out);
}

void check_reverse_step(const Tensor& x_t, const Tensor& table, const OptionalTensor& t, int64_t t_index,
                        const OptionalTensor& noise, bool draw_noise, DDPM_RNG_PARAMETERS, const OptionalTensor& out) {
  const std::initializer_list<Named> tensors = {{"x_t", x_t}, {"noise", noise},           {"table", table},
                                                {"t", t},     {"sample_ids", sample_ids}, {"out", out}};
  if (!plain(tensors)) return check_agreement("reverse_step", tensors);
  ddpm_ext::check_reverse_step(x_t, table, t, t_index, noise, draw_noise, DDPM_RNG, out);
}

void extended_step(const Tensor& x_t, const OptionalTensor& model_output, const Tensor& table, const OptionalTensor& t,
                   int64_t t_index, double clip_min, double clip_max, const OptionalTensor& noise, bool draw_noise,
                   DDPM_RNG_PARAMETERS, const Tensor& out, DDPM_EXTRAS_PARAMETERS) {
  const std::initializer_list<Named> tensors = {{"x_t", x_t},
                                                {"model_output", model_output},
                                                {"noise", noise},
                                                {"table", table},
                                                {"t", t},
                                                {"sample_ids", sample_ids},
                                                {"out", out},
                                                {"uncond_output", uncond_output},
                                                {"output_scale", output_scale},
                                                {"model_variance", model_variance},
                                                {"x_start", x_start},
                                                {"x_start_scale", x_start_scale},
                                                {"history", history},
                                                {"gradient", gradient},
                                                {"known", known},
                                                {"mask", mask},
                                                {"out_copy", out_copy},
                                                {"x0_out", x0_out}};
  refuse_grad("extended_step", tensors, "it");
  if (needs_dispatcher("extended_step", tensors)) {
    static const auto op = c10::Dispatcher::singleton()
                               .findSchemaOrThrow("ddpm_ext::extended_step", "")
                               .typed<decltype(library::extended_step)>();
    return op.call(x_t, model_output, table, t, t_index, clip_min, clip_max, noise, draw_noise, DDPM_RNG_ARGUMENTS, out,
                   uncond_output, output_scale, model_variance, log_variance, x_start, x_start_scale, history, gradient,
                   known, mask, out_copy, x0_out);
  }
  RECORD_FUNCTION("ddpm_ext::extended_step", std::vector<c10::IValue>());
  ddpm_ext::extended_step(x_t, model_output, table, t, t_index, clip_min, clip_max, noise, draw_noise, DDPM_RNG,
                          DDPM_EXTRAS, out);
}

Tensor forward_process(const Tensor& x_start, const Tensor& table, const OptionalTensor& t, int64_t t_index,
                       const OptionalTensor& noise, bool draw_noise, DDPM_RNG_PARAMETERS, const OptionalTensor& out) {
  if (out.has_value()) refuse_grad("forward_process", {{"x_start", x_start}, {"noise", noise}, {"out", out}});
  if (needs_dispatcher("forward_process", {{"x_start", x_start},
                                           {"noise", noise},
                                           {"table", table},
                                           {"t", t},
                                           {"sample_ids", sample_ids},
                                           {"out", out}})) {
    if (out.has_value()) {
      static const auto op = c10::Dispatcher::singleton()
                                 .findSchemaOrThrow("ddpm_ext::forward_process", "out")
                                 .typed<decltype(library::forward_process_out)>();
      Tensor result = *out;
      op.call(x_start, table, t, t_index, noise, draw_noise, DDPM_RNG_ARGUMENTS, result);
      return result;
    }
    static const auto op = c10::Dispatcher::singleton()
                               .findSchemaOrThrow("ddpm_ext::forward_process", "")
                               .typed<decltype(library::forward_process)>();
    return op.call(x_start, table, t, t_index, noise, draw_noise, DDPM_RNG_ARGUMENTS);
  }
  RECORD_FUNCTION("ddpm_ext::forward_process", std::vector<c10::IValue>());
  return ddpm_ext::forward_process(x_start, table, t, t_index, noise, draw_noise, DDPM_RNG, out);
}

std::tuple<Tensor, Tensor> diffusion_loss(const Tensor& model_output, const OptionalTensor& x_start,
                                          const Tensor& table, const OptionalTensor& t, int64_t t_index, int64_t kind,
                                          double delta, const OptionalTensor& noise, DDPM_RNG_PARAMETERS,
                                          int64_t reduction, bool want_slope, bool variational, bool detach_mean) {
  if (needs_dispatcher("diffusion_loss", {{"model_output", model_output},
                                          {"x_start", x_start},
                                          {"noise", noise},
                                          {"table", table},
                                          {"t", t},
                                          {"sample_ids", sample_ids}})) {
    static const auto op = c10::Dispatcher::singleton()
                               .findSchemaOrThrow("ddpm_ext::diffusion_loss", "")
                               .typed<decltype(library::diffusion_loss)>();
    return op.call(model_output, x_start, table, t, t_index, kind, delta, noise, DDPM_RNG_ARGUMENTS, reduction,
                   want_slope, variational, detach_mean);
  }
  RECORD_FUNCTION("ddpm_ext::diffusion_loss", std::vector<c10::IValue>());
  return ddpm_ext::diffusion_loss(model_output, x_start, table, t, t_index, kind, delta, noise, DDPM_RNG, reduction,
                                  want_slope, variational, detach_mean);
}

using Affine = Tensor(const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&, int64_t);

// `name` is "ddpm_ext::" and the operator's.
template <Affine* kDirect>
Tensor affine(const char* name, const Named& x, const Named& y, const Tensor& table, const OptionalTensor& t,
              int64_t t_index) {
  if (needs_dispatcher(name + sizeof("ddpm_ext::") - 1, {x, y, {"table", table}, {"t", t}})) {
    static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Affine>();
    return op.call(*x.tensor, *y.tensor, table, t, t_index);
  }
  RECORD_FUNCTION(name, std::vector<c10::IValue>());
  return kDirect(*x.tensor, *y.tensor, table, t, t_index);
}

Tensor predict_start(const Tensor& x_t, const Tensor& noise, const Tensor& table, const OptionalTensor& t,
                     int64_t t_index) {
  return affine<ddpm_ext::predict_start>("ddpm_ext::predict_start", {"x_t", x_t}, {"noise", noise}, table, t, t_index);
}

Tensor posterior_mean(const Tensor& x_start, const Tensor& x_t, const Tensor& table, const OptionalTensor& t,
                      int64_t t_index) {
  return affine<ddpm_ext::posterior_mean>("ddpm_ext::posterior_mean", {"x_start", x_start}, {"x_t", x_t}, table, t,
                                          t_index);
}

// The published test vectors reach the kernels' own Philox through this.
std::array<uint32_t, 4> philox4x32(std::array<uint32_t, 4> counter, std::array<uint32_t, 2> key) {
  const ddpm_ext::PhiloxKeys keys = ddpm_ext::philox_keys(key[0] | (uint64_t{key[1]} << 32));
  std::array<uint32_t, 4> w;
  uint32_t out[4];
  ddpm_ext::philox_block(keys, ddpm_ext::philox_sample(keys, {counter[1], counter[2], counter[3]}), counter[0], out);
  std::copy(out, out + 4, w.begin());
  return w;
}

#if defined(__clang__)
constexpr const char* kCompiler = "clang " __clang_version__;
#else
constexpr const char* kCompiler = "gcc " __VERSION__;
#endif

py::dict build_info() {
  py::dict info;
  info["torch"] = DDPM_EXT_TORCH_VERSION;
#ifdef DDPM_EXT_WITH_CUDA
  info["cuda"] = DDPM_EXT_CUDA_VERSION;
  info["cuda_architectures"] = DDPM_EXT_CUDA_ARCHS;
#else
  info["cuda"] = py::none();
  info["cuda_architectures"] = "";
#endif
  info["compiler"] = kCompiler;
  info["cpu"] = ddpm_ext::cpu::instruction_set();
  return info;
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  // Of this module alone, and of what it raises itself: torch knows the others.
  py::register_local_exception_translator([](std::exception_ptr p) {
    try {
      if (p) std::rethrow_exception(p);
    } catch (const c10::TypeError& e) {
      PyErr_SetString(PyExc_TypeError, e.what_without_backtrace());
    } catch (const c10::ValueError& e) {
      PyErr_SetString(PyExc_ValueError, e.what_without_backtrace());
    }
  });
  using Unlocked = py::call_guard<py::gil_scoped_release>;
  m.def("reverse_step", &reverse_step, Unlocked());
  m.def("extended_step", &extended_step, Unlocked());
  m.def("check_reverse_step", &check_reverse_step);
  m.def("forward_process", &forward_process, Unlocked());
  m.def("diffusion_loss", &diffusion_loss, Unlocked());
  m.def("predict_start", &predict_start, Unlocked());
  m.def("posterior_mean", &posterior_mean, Unlocked());
  m.def("draw_seed", &ddpm_ext::draw_seed);
  m.def("philox4x32", &philox4x32);
  m.def("build_info", &build_info);
}
