// The Python module ddpm_ext._C: the operators for eager calls. They run without torch's dispatcher, which would cost
// more than the arithmetic of a small step, unless the dispatcher has something to do (ops/direct_call.h).
#include <ATen/SavedTensorHooks.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty_like.h>
#include <ATen/record_function.h>
#include <torch/csrc/Device.h>
#include <torch/csrc/utils/pybind.h>

#include <initializer_list>

#include "core/philox.h"
#include "core/step.h"
#include "cpu/operators.h"
#include "ops/block_pool.h"
#include "ops/checks.h"
#include "ops/direct_call.h"
#include "ops/eager_steps.h"
#include "ops/fastcall.h"
#include "ops/library.h"
#include "ops/result_memory.h"
#include "ops/table_step.h"

namespace py = pybind11;
namespace library = ddpm_ext::library;
using at::Tensor;
using ddpm_ext::Named;
using ddpm_ext::needs_dispatcher;
using ddpm_ext::OptionalTensor;
using ddpm_ext::refuse_grad;

namespace {

void step_with_options(DDPM_STEP_PARAMETERS) {
  using namespace ddpm_ext;
  eager::step_with_options(DDPM_GIVEN, table, t, t_index, clip_min, clip_max, noise, draw_noise, DDPM_RNG_STRUCT);
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
  return ddpm_ext::forward_process(x_start, table, t, t_index, noise, draw_noise, DDPM_RNG_STRUCT, out);
}

std::tuple<Tensor, Tensor> forward_process_and_noise(const Tensor& x_start, const Tensor& table,
                                                     const OptionalTensor& t, int64_t t_index, DDPM_RNG_PARAMETERS) {
  if (needs_dispatcher("forward_process",
                       {{"x_start", x_start}, {"table", table}, {"t", t}, {"sample_ids", sample_ids}}))
    return {forward_process(x_start, table, t, t_index, std::nullopt, true, DDPM_RNG_ARGUMENTS, std::nullopt),
            Tensor()};
  RECORD_FUNCTION("ddpm_ext::forward_process", std::vector<c10::IValue>());
  return ddpm_ext::forward_process_and_noise(x_start, table, t, t_index, DDPM_RNG_STRUCT);
}

std::tuple<Tensor, Tensor> diffusion_loss(const Tensor& model_output, const OptionalTensor& x_start,
                                          const Tensor& table, const OptionalTensor& t, int64_t t_index, int64_t kind,
                                          double delta, const OptionalTensor& noise, DDPM_RNG_PARAMETERS,
                                          int64_t reduction, bool want_slope, bool variational, bool detach_mean,
                                          bool overwrite_noise) {
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
  return ddpm_ext::diffusion_loss(model_output, x_start, table, t, t_index, kind, delta, noise, DDPM_RNG_STRUCT,
                                  reduction, want_slope, variational, detach_mean, overwrite_noise);
}

using Affine = Tensor(const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&, int64_t);

// `name` is "ddpm_ext::" followed by the operator's name.
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

// The kernels' own Philox, for the tests with the published vectors.
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

// What torch's modes and subclasses make is theirs.
Tensor empty_result_like(const Tensor& like) {
  if (!ddpm_ext::plain({{"like", like}})) return at::empty_like(like);
  return ddpm_ext::empty_result_like(like, like.scalar_type());
}

py::dict result_memory() {
  const ddpm_ext::BlockPool::State state = ddpm_ext::BlockPool::instance().state();
  py::dict info;
  info["limit"] = state.limit;
  info["kept"] = state.kept;
  info["kept_blocks"] = state.kept_blocks;
  info["used"] = state.used;
  return info;
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  // For the exceptions that this module itself raises. torch translates all others.
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
  using namespace ddpm_ext::fastcall;
  ddpm_ext::define_table_step(m);
  Function<&ddpm_ext::eager::reverse_step>::define(m, "reverse_step");
  Function<&step_with_options>::define(m, "step_with_options");
  Function<&ddpm_ext::eager::x_start_scale>::define(m, "x_start_scale");
  Function<&ddpm_ext::eager::output_scale>::define(m, "output_scale");
  Function<&forward_process>::define(m, "forward_process");
  Function<&forward_process_and_noise>::define(m, "forward_process_and_noise");
  Function<&diffusion_loss>::define(m, "diffusion_loss");
  m.def("check_reverse_step", &ddpm_ext::eager::check_reverse_step);
  m.def("predict_start", &predict_start, Unlocked());
  m.def("posterior_mean", &posterior_mean, Unlocked());
  m.def("draw_seed", &ddpm_ext::draw_seed);
  // Torch 2.7 does not have this in Python.
  m.def("has_saved_tensors_hooks", [] { return at::SavedTensorDefaultHooks::get_hooks().has_value(); });
  m.def("philox4x32", &philox4x32);
  m.def("row_names",
        [] { return std::vector<std::string>(std::begin(ddpm_ext::kRowNames), std::end(ddpm_ext::kRowNames)); });
  m.def("build_info", &build_info);
  m.def("empty_result_like", &empty_result_like);
  m.def("result_memory", &result_memory);
  m.def("release_result_memory", [] { ddpm_ext::BlockPool::instance().release(); }, Unlocked());
  m.def("limit_result_memory", [](size_t bytes) { ddpm_ext::BlockPool::instance().set_limit(bytes); }, Unlocked());
}
