// The class ddpm_ext._C.TableStep: the steps of a table, with their clip and noise. Each call may have any of the
// optional inputs (core/step_inputs.def) as keywords; without them it is the reverse step. `quantile` and `maximum`
// compute x_start_scale, and `guidance` and `rescale` output_scale, in a launch before the step's.
//
// Its methods are called by CPython's own convention: to parse a call by pybind11 takes a small step longer than all of
// its checks.
#include "ops/table_step.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/empty_like.h>
#include <c10/core/GradMode.h>

#include <limits>
#include <vector>

#include "ops/direct_call.h"
#include "ops/eager.h"
#include "ops/fastcall.h"
#include "ops/library.h"
#include "ops/result_memory.h"

namespace py = pybind11;

namespace ddpm_ext {
namespace {

using fastcall::Argument;

struct TableStep {
  Tensor table;
  OptionalTensor on_host;  // the same table on the CPU, unless it is `table` itself
  double clip_min, clip_max;
  NoiseSource source;
  bool fresh;  // whether each call draws a seed of its own
  // Functions in Python, for what is rare.
  py::object split_t;         // (t) -> (None, int), or the error that says what is wrong with t
  py::object seed_in_memory;  // (device) -> a seed as a tensor, or None
  py::object timesteps;       // (row, batch, device) -> what a model is called with for an int t
  py::object unwrap;          // (what a model returned) -> its tensor
  py::object split_variance;  // (x_t, a model's output) -> the error for one that is not twice x_t's channels,
  py::object split_batch;     // and for one that is not twice its batch
  int64_t batch = -1;         // of the last call with an int t,
  py::object by_row;          // and what models were called with for such a batch, by t
};

const auto as_tensor = Argument<Tensor>::of;
const auto as_optional_tensor = Argument<OptionalTensor>::of;
const auto as_index = Argument<int64_t>::of;

// The optional arguments of one call. Their tensors belong to the caller.
struct Options {
  StepInputs inputs;
  std::optional<double> quantile, maximum;  // of x_start_scale
  std::optional<double> guidance, rescale;  // of output_scale
  // Of run: x_t twice, for a model that returns the unconditional output first, and then the other one; and whether
  // rows read the variance that is the second half of the output's channels.
  PyObject* doubled = nullptr;
  std::optional<bool> learned;
  bool any = false;  // whether the call has any besides its noise
};

void set(const Tensor*& option, const char* name, PyObject* value) {
  if (!THPVariable_Check(value)) Argument<Tensor>::of(name, value);  // raises
  option = &THPVariable_Unpack(value);
}
void set(PyObject*& option, const char* name, PyObject* value) {
  Argument<Tensor>::of(name, value);  // raises
  option = value;
}
void set(bool& option, const char* name, PyObject* value) { option = Argument<bool>::of(name, value); }
void set(std::optional<bool>& option, const char* name, PyObject* value) { option = Argument<bool>::of(name, value); }
void set(std::optional<double>& option, const char* name, PyObject* value) {
  option = Argument<double>::of(name, value);
}

// A keyword, and what it sets.
struct Keyword {
  PyObject* name;  // interned, so that it is nearly always found by its address
  void (*set)(Options&, PyObject*);
};

#define DDPM_KEYWORD(name, option) \
  {PyUnicode_InternFromString(#name), [](Options& o, PyObject* value) { set(o.option, #name, value); }},
#define DDPM_INPUT_KEYWORD(name) DDPM_KEYWORD(name, inputs[Role::name])
#define DDPM_FACTOR_KEYWORD(name) DDPM_KEYWORD(name, inputs[Factor::name])
#define DDPM_RESULT_KEYWORD(name, ...) DDPM_KEYWORD(name, inputs[Result::name])
#define DDPM_FLAG_KEYWORD(name, ...) DDPM_KEYWORD(name, inputs.name)

// The first of the keywords do not make a step one with options.
constexpr Py_ssize_t kOfAnyStep = 3;

const std::vector<Keyword>& keywords() {
  static const std::vector<Keyword> all = {
      DDPM_INPUT_KEYWORD(noise) DDPM_KEYWORD(doubled, doubled) DDPM_KEYWORD(learned, learned) DDPM_STEP_INPUTS(
          DDPM_INPUT_KEYWORD, DDPM_INPUT_KEYWORD, DDPM_FACTOR_KEYWORD, DDPM_FLAG_KEYWORD, DDPM_RESULT_KEYWORD)
          DDPM_KEYWORD(quantile, quantile) DDPM_KEYWORD(maximum, maximum) DDPM_KEYWORD(guidance, guidance)
              DDPM_KEYWORD(rescale, rescale)};
  return all;
}

const Keyword& find_keyword(PyObject* name) {
  for (const Keyword& keyword : keywords())
    if (keyword.name == name) return keyword;
  for (const Keyword& keyword : keywords())
    if (PyUnicode_Compare(keyword.name, name) == 0) return keyword;
  std::string known;
  for (const Keyword& keyword : keywords()) known += (known.empty() ? "" : ", ") + std::string(py::str(keyword.name));
  TORCH_CHECK_TYPE(false, "TableStep: unknown input ", std::string(py::str(name)), ", expected one of ", known);
}

// `values` follow the names in the tuple `names`, which is null if there are none. None counts as not given.
Options read_options(PyObject* const* values, PyObject* names) {
  Options options;
  for (Py_ssize_t i = 0; names != nullptr && i < PyTuple_GET_SIZE(names); ++i) {
    const Keyword& keyword = find_keyword(PyTuple_GET_ITEM(names, i));
    if (values[i] == Py_None) continue;
    keyword.set(options, values[i]);
    options.any = options.any || &keyword - keywords().data() >= kOfAnyStep;
  }
  return options;
}

Rows rows_at(const TableStep& step, OptionalTensor t, int64_t index) {
  return {step.table, std::move(t), index, pointer(step.on_host)};
}

// `t` is an int or a tensor. What else counts as an int, and the errors, are split_t's.
Rows rows_of(const TableStep& step, PyObject* t) {
  if (PyLong_CheckExact(t)) {
    int overflow = 0;
    const int64_t index = PyLong_AsLongLongAndOverflow(t, &overflow);
    if (overflow == 0) return rows_at(step, {}, index);
  } else if (THPVariable_Check(t)) {
    return rows_at(step, THPVariable_Unpack(t), 0);
  }
  const py::tuple split = step.split_t(py::handle(t));
  return rows_at(step, {}, split[1].cast<int64_t>());
}

// A new reference to the result, which is `out` itself unless that is None.
PyObject* take_step(const TableStep& step, PyObject* samples, const Tensor& x_t, const OptionalTensor& m,
                    const Rows& rows, PyObject* out, Options& options) {
  StepInputs& given = options.inputs;
  NoiseSource source = step.source;
  if (given[Role::noise] != nullptr) {
    source.noise = *given[Role::noise];
    source.draw_noise = source.draw_noise && !step.fresh;
  } else if (step.fresh) {
    // A graph that is being captured, and modes and transforms of torch, may need one that torch's operators draw.
    if (!x_t.is_cpu() || !plain({{"x_t", x_t}})) {
      const py::object drawn = step.seed_in_memory(py::handle(samples).attr("device"));
      source.rng.seed = as_optional_tensor("seed", drawn.ptr());
    }
    if (!source.rng.seed.has_value()) source.rng.seed_value = draw_seed();
  }
  const bool with_options = options.any || !m.has_value();
  OptionalTensor result = as_optional_tensor("out", out), output_scale, x_start_scale;
  {
    const fastcall::WithoutGil unlocked(!fastcall::is_brief(x_t));
    if (with_options) {
      if (!result.has_value())
        result = plain({{"x_t", x_t}}) ? empty_result_like(x_t, x_t.scalar_type()) : at::empty_like(x_t);
      given[Role::x_t] = &x_t, given[Role::model_output] = pointer(m);
      given[Result::out] = &*result;
      const Tensor* const u = given[Role::uncond_output];
      if (options.guidance.has_value() || options.rescale.has_value()) {
        TORCH_CHECK_VALUE(u != nullptr && m.has_value(), "TableStep: rescale is given without ",
                          m.has_value() ? "uncond_output" : "model_output", ", expected both");
        output_scale = eager::output_scale(*m, *u, options.guidance.value_or(1), options.rescale.value_or(0));
        given[Factor::output_scale] = &*output_scale;
      }
      if (options.quantile.has_value() || options.maximum.has_value()) {
        const double quantile = options.quantile.value_or(0);  // which is refused
        const double maximum = options.maximum.value_or(std::numeric_limits<double>::infinity());
        const OptionalTensor none, scale = eager::optional(given[Factor::output_scale]);
        const Tensor* const x_start = given[Role::x_start];
        x_start_scale = x_start != nullptr
                            ? eager::x_start_scale(*x_start, none, none, none, 0, quantile, maximum, none, none)
                            : eager::x_start_scale(x_t, m, rows.table, rows.t, rows.t_index, quantile, maximum,
                                                   eager::optional(u), scale);
        given[Factor::x_start_scale] = &*x_start_scale;
      }
      eager::step_with_options(given, rows, step.clip_min, step.clip_max, source);
    } else {
      result = eager::reverse_step(x_t, *m, rows, step.clip_min, step.clip_max, source, result);
    }
  }
  return out != Py_None ? Py_NewRef(out) : THPVariable_Wrap(std::move(*result));
}

// What a model is called with beside samples: t itself if it is a tensor.
py::object timesteps_of(TableStep& step, PyObject* samples, const Tensor& x_t, const Rows& rows, PyObject* t) {
  if (rows.t.has_value()) return py::reinterpret_borrow<py::object>(t);
  const int64_t batch = x_t.size(0);
  if (step.batch != batch) step.by_row = py::dict(), step.batch = batch;
  const py::object by_row = step.by_row;  // another thread's call may put one for another batch in its place
  const py::int_ row(rows.t_index);
  PyObject* const found = PyDict_GetItemWithError(by_row.ptr(), row.ptr());
  if (found != nullptr && THPVariable_Unpack(found)._version() == 0)  // a model may have written to it
    return py::reinterpret_borrow<py::object>(found);
  const py::object made = step.timesteps(row, batch, py::handle(samples).attr("device"));
  if (THPVariable_CheckExact(made.ptr()) && plain({{"t", THPVariable_Unpack(made.ptr())}})) by_row[row] = made;
  return made;
}

// whole.narrow(dim, from, size), past the dispatcher where that has nothing to do.
Tensor part_of(const Tensor& whole, int64_t dim, int64_t from, int64_t size) {
  if (!plain({{"model_output", whole}})) return whole.narrow(dim, from, size);
  c10::DimVector sizes(whole.sizes());
  sizes[dim] = size;
  return at::native::as_strided_tensorimpl(whole, sizes, whole.strides(),
                                           whole.storage_offset() + from * whole.stride(dim));
}

// The parts of what a model returned, which the inputs then point to, and the prediction.
struct Parts {
  Tensor prediction, unconditional, variance;
};

void split(const TableStep& step, const py::handle x_t, const Tensor& batch, Options& options, Parts& parts) {
  if (options.doubled != nullptr) {
    const int64_t half = batch.dim() == 0 ? 0 : batch.size(0);
    if (parts.prediction.dim() == 0 || parts.prediction.size(0) != 2 * half) step.split_batch(x_t, parts.prediction);
    parts.unconditional = part_of(parts.prediction, 0, 0, half);
    parts.prediction = part_of(parts.prediction, 0, half, half);
    options.inputs[Role::uncond_output] = &parts.unconditional;
    options.any = true;
  }
  if (!options.learned.has_value()) return;
  const int64_t channels = batch.dim() < 2 ? 0 : batch.size(1);
  c10::DimVector expected(batch.sizes());
  if (channels != 0) expected[1] *= 2;
  for (Tensor* const part : {&parts.unconditional, &parts.prediction}) {
    if (!part->defined()) continue;
    if (channels == 0 || !part->sizes().equals(expected)) step.split_variance(x_t, *part);
    if (part == &parts.prediction) parts.variance = part_of(*part, 1, channels, channels);
    *part = part_of(*part, 1, 0, channels);
  }
  if (!*options.learned) return;
  options.inputs[Role::model_variance] = &parts.variance;
  options.any = true;
}

// check(x_t, row, index, out): raises what take would raise.
PyObject* check(TableStep& step, PyObject* const* args, Options&) {
  const Tensor x_t = as_tensor("x_t", args[0]);
  const Rows rows = rows_at(step, as_optional_tensor("t", args[1]), as_index("t", args[2]));
  eager::check_reverse_step(x_t, rows, step.source, as_optional_tensor("out", args[3]));
  return Py_NewRef(Py_None);
}

// take(x_t, model_output, row, index, out, **options): the next samples.
PyObject* take(TableStep& step, PyObject* const* args, Options& options) {
  const Tensor x_t = as_tensor("x_t", args[0]);
  const Rows rows = rows_at(step, as_optional_tensor("t", args[2]), as_index("t", args[3]));
  TORCH_CHECK_TYPE(options.doubled == nullptr && !options.learned.has_value(),
                   "TableStep: take has no doubled and no learned, which are run's");
  return take_step(step, args[0], x_t, as_optional_tensor("model_output", args[1]), rows, args[4], options);
}

// run(model, x_t, t, out, timesteps, **options): the next samples by what model(x_t, timesteps) returns, or
// model(doubled, timesteps), all without recording gradients. Wrong arguments are errors before the model is called. If
// timesteps is None, they follow from t.
PyObject* run(TableStep& step, PyObject* const* args, Options& options) {
  const at::NoGradGuard no_grad;
  PyObject *const samples = args[1], *const t = args[2], *const out = args[3];
  const Tensor x_t = as_tensor("x_t", samples);
  const Rows rows = rows_of(step, t);
  eager::check_reverse_step(x_t, rows, step.source, as_optional_tensor("out", out));
  const py::object timesteps =
      args[4] == Py_None ? timesteps_of(step, samples, x_t, rows, t) : py::reinterpret_borrow<py::object>(args[4]);
  PyObject* of_model[] = {nullptr, options.doubled == nullptr ? samples : options.doubled, timesteps.ptr()};
  auto output = py::reinterpret_steal<py::object>(
      PyObject_Vectorcall(args[0], of_model + 1, 2 | PY_VECTORCALL_ARGUMENTS_OFFSET, nullptr));
  if (!output) throw py::error_already_set();
  c10::GradMode::set_enabled(false);  // a model may have switched them on
  if (!THPVariable_Check(output.ptr())) output = step.unwrap(output);
  Parts parts{as_tensor("model_output", output.ptr())};
  if (options.doubled != nullptr || options.learned.has_value()) split(step, samples, x_t, options, parts);
  return take_step(step, samples, x_t, parts.prediction, rows, out, options);
}

TableStep make(const Tensor& table, OptionalTensor on_host, double clip_min, double clip_max, DDPM_SOURCE_PARAMETERS,
               bool fresh, py::object split_t, py::object seed_in_memory, py::object timesteps, py::object unwrap,
               py::object split_variance, py::object split_batch) {
  if (on_host.has_value())
    TORCH_CHECK_VALUE(on_host->is_cpu() && on_host->scalar_type() == table.scalar_type() && on_host->is_contiguous() &&
                          on_host->sizes() == table.sizes(),
                      "TableStep: on_host is ", on_host->scalar_type(), " ", on_host->sizes(), " on ",
                      on_host->device(), ", expected a contiguous ", table.scalar_type(), " ", table.sizes(),
                      " on the CPU");
  // A CPU's kernels read the row where it lies.
  if (on_host.has_value() && on_host->is_same(table)) on_host.reset();
  return {table,   on_host,        clip_min,  clip_max, DDPM_SOURCE,    fresh,
          split_t, seed_in_memory, timesteps, unwrap,   split_variance, split_batch};
}

using Method = PyObject*(TableStep&, PyObject* const*, Options&);

// The last of kArguments may be left out, and is None then.
template <Method* kMethod, Py_ssize_t kArguments>
PyObject* called(PyObject* self, PyObject* const* args, Py_ssize_t count, PyObject* names) {
  return fastcall::guarded([=] {
    PyObject* positional[kArguments];
    positional[kArguments - 1] = Py_None;
    if (count != kArguments - 1) fastcall::check_count("TableStep", count, kArguments);
    std::copy(args, args + count, positional);
    void* const step = reinterpret_cast<py::detail::instance*>(self)->get_value_and_holder().value_ptr();
    TORCH_CHECK_TYPE(step != nullptr, "TableStep: __init__ was not called");
    Options options = read_options(args + count, names);
    return kMethod(*static_cast<TableStep*>(step), positional, options);
  });
}

}  // namespace

void define_table_step(py::module_& m) {
  static PyMethodDef methods[] = {fastcall::definition("check", called<check, 4>),
                                  fastcall::definition("take", called<take, 5>),
                                  fastcall::definition("run", called<run, 5>)};
  py::class_<TableStep> type(m, "TableStep");
  type.def(py::init(&make));
  for (PyMethodDef& each : methods) {
    auto* const of = reinterpret_cast<PyTypeObject*>(type.ptr());
    type.attr(each.ml_name) = py::reinterpret_steal<py::object>(PyDescr_NewMethod(of, &each));
  }
}

}  // namespace ddpm_ext
