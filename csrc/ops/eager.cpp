// The operators for eager calls. They skip torch's dispatcher, which takes longer than the arithmetic of a small step,
// unless the call needs the dispatcher (ops/direct_call.h). Python passes the schema's arguments by position, and then
// the arguments that only a direct call takes.
#include "ops/eager.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/record_function.h>

#include "ops/checks.h"
#include "ops/direct_call.h"
#include "ops/library.h"

namespace py = pybind11;

namespace ddpm_ext::eager {
namespace {

// Up to this number of elements on a CPU, releasing Python's global lock (the GIL) takes longer than the operator
// itself.
constexpr int64_t kBrief = 8192;

bool is_brief(const Tensor& x) {
  return x.is_cpu() && !x.unsafeGetTensorImpl()->has_symbolic_sizes_strides() && x.numel() <= kBrief;
}

// Returns the name of an argument for error messages. In Python, `draw` of Philox is an int or a tensor.
const char* shown_name(const c10::Argument& argument) {
  return argument.name() == "draw_data" ? "draw" : argument.name().c_str();
}

template <class Signature>
struct Operator;

template <class Result, class... Args>
struct Operator<Result(Args...)> {
  // Defines the Python function `name`. It calls `direct`, or torch's operator if the call needs the dispatcher.
  // Torch's operator is called `of_schema`, or `name` if that is null. If the operator records no gradients, the
  // function refuses tensors that require a gradient while gradients are enabled, and `recorder` is the subject of the
  // error message. Otherwise `recorder` is null.
  template <class Direct, class... Extra>
  static void define(py::module_& m, const char* name, Direct (*direct)(Args..., Extra...),
                     const char* recorder = nullptr, const char* of_schema = nullptr, const char* overload = "") {
    const std::string full = std::string("ddpm_ext::") + (of_schema == nullptr ? name : of_schema);
    const auto op = c10::Dispatcher::singleton().findSchemaOrThrow(full.c_str(), overload).typed<Result(Args...)>();
    m.def(name, [=](Args... args, Extra... extra) -> Direct {
      const c10::FunctionSchema& schema = op.schema();
      const char* const name = schema.name().c_str() + sizeof("ddpm_ext::") - 1;
      const c10::Argument* argument = schema.arguments().data();
      const NamedTensor tensors[] = {NamedTensor(shown_name(*argument++), args)...};
      std::optional<py::gil_scoped_release> unlocked;
      if (!is_brief(*tensors[0].tensor)) unlocked.emplace();
      if (recorder != nullptr) refuse_grad(name, tensors, recorder);
      if (needs_dispatcher(name, tensors)) {
        if constexpr (std::is_same_v<Direct, Result>)
          return op.call(args...);
        else
          return {op.call(args...), Tensor()};
      }
      RECORD_FUNCTION(schema.name().c_str(), std::vector<c10::IValue>());
      return direct(args..., extra...);
    });
  }
};

// Returns the rows with on_host set. `on_host` must be the same table on the CPU, contiguous. All of this is checked
// except its values.
Rows with_host(Rows rows, const OptionalTensor& on_host) {
  const Tensor& table = rows.table;
  if (on_host.has_value())
    TORCH_CHECK_VALUE(on_host->is_cpu() && on_host->scalar_type() == table.scalar_type() && on_host->is_contiguous() &&
                          on_host->sizes() == table.sizes(),
                      "TableStep: on_host is ", on_host->scalar_type(), " ", on_host->sizes(), " on ",
                      on_host->device(), ", expected a contiguous ", table.scalar_type(), " ", table.sizes(),
                      " on the CPU");
  rows.on_host = pointer(on_host);
  return rows;
}

Tensor reverse_step(const Tensor& x_t, const Tensor& model_output, DDPM_ROWS_PARAMETERS, double clip_min,
                    double clip_max, DDPM_SOURCE_PARAMETERS, const OptionalTensor& on_host) {
  return ddpm_ext::reverse_step(x_t, model_output, with_host(DDPM_ROWS, on_host), clip_min, clip_max, DDPM_SOURCE, {});
}

void reverse_step_out(const Tensor& x_t, const Tensor& model_output, DDPM_ROWS_PARAMETERS, double clip_min,
                      double clip_max, DDPM_SOURCE_PARAMETERS, Tensor& out, const OptionalTensor& on_host) {
  ddpm_ext::reverse_step(x_t, model_output, with_host(DDPM_ROWS, on_host), clip_min, clip_max, DDPM_SOURCE, out);
}

// Like ddpm_ext::check_reverse_step. But if the tensors are not plain, this only checks that they agree and, for `out`,
// the dtype and that it is not a negated view.
void check_reverse_step(const Tensor& x_t, DDPM_ROWS_PARAMETERS, DDPM_SOURCE_PARAMETERS, const OptionalTensor& out) {
  const NamedTensor tensors[] = {{"x_t", x_t},   {"table", table},           {"t", t},     {"noise", noise},
                                 {"seed", seed}, {"sample_ids", sample_ids}, {"out", out}, {"draw", draw_data}};
  if (plain(tensors)) return ddpm_ext::check_reverse_step(x_t, DDPM_ROWS, DDPM_SOURCE, out);
  if (out.has_value()) {
    check_not_negated("reverse_step", "out", *out);
    dtype_of("reverse_step", "out", out->scalar_type());
  }
  check_agreement("reverse_step", tensors);
}

void step_with_options(DDPM_STEP_PARAMETERS, const OptionalTensor& on_host) {
  ddpm_ext::step_with_options(DDPM_STEP_ARGUMENTS, with_host(DDPM_ROWS, on_host), clip_min, clip_max, DDPM_SOURCE);
}

Tensor forward_process(const Tensor& x_start, DDPM_ROWS_PARAMETERS, DDPM_SOURCE_PARAMETERS) {
  return ddpm_ext::forward_process(x_start, DDPM_ROWS, DDPM_SOURCE, {});
}

void forward_process_out(const Tensor& x_start, DDPM_ROWS_PARAMETERS, DDPM_SOURCE_PARAMETERS, Tensor& out) {
  ddpm_ext::forward_process(x_start, DDPM_ROWS, DDPM_SOURCE, out);
}

std::tuple<Tensor, Tensor> forward_process_and_noise(const Tensor& x_start, DDPM_ROWS_PARAMETERS,
                                                     DDPM_SOURCE_PARAMETERS) {
  return ddpm_ext::forward_process_and_noise(x_start, DDPM_ROWS, DDPM_RNG);
}

std::tuple<Tensor, Tensor> diffusion_loss(const Tensor& model_output, const OptionalTensor& x_start,
                                          DDPM_ROWS_PARAMETERS, int64_t kind, double delta, const OptionalTensor& noise,
                                          DDPM_RNG_PARAMETERS, int64_t reduction, bool want_slope, bool variational,
                                          bool detach_mean, bool overwrite_noise) {
  return ddpm_ext::diffusion_loss(model_output, x_start, DDPM_ROWS, kind, delta, noise, DDPM_RNG, reduction, want_slope,
                                  variational, detach_mean, overwrite_noise);
}

template <auto* kAffine>
Tensor affine(const Tensor& x, const Tensor& y, DDPM_ROWS_PARAMETERS) {
  return kAffine(x, y, DDPM_ROWS);
}

}  // namespace

void define(py::module_& m) {
  using Step = Operator<decltype(library::reverse_step)>;
  using Forward = Operator<decltype(library::forward_process)>;
  using Affine = Operator<decltype(affine<predict_start>)>;
  Step::define(m, "reverse_step", reverse_step);
  Operator<decltype(library::reverse_step_out)>::define(m, "reverse_step_out", reverse_step_out, "out=", "reverse_step",
                                                        "out");
  m.def("check_reverse_step", &check_reverse_step);
  Operator<decltype(library::step_with_options)>::define(m, "step_with_options", step_with_options, "it");
  Operator<decltype(x_start_scale)>::define(m, "x_start_scale", x_start_scale, "it");
  Operator<decltype(output_scale)>::define(m, "output_scale", output_scale, "it");
  Forward::define(m, "forward_process", forward_process);
  Forward::define(m, "forward_process_and_noise", forward_process_and_noise, nullptr, "forward_process");
  Operator<decltype(library::forward_process_out)>::define(m, "forward_process_out", forward_process_out,
                                                           "out=", "forward_process", "out");
  Operator<decltype(library::diffusion_loss)>::define(m, "diffusion_loss", diffusion_loss);
  Affine::define(m, "predict_start", affine<predict_start>);
  Affine::define(m, "posterior_mean", affine<posterior_mean>);
}

}  // namespace ddpm_ext::eager
