// The class ddpm_ext._C.ReverseStep: reverse_step with its table, clip and noise.
//
// Its methods are called by CPython's own convention: to parse a call by pybind11 takes a small step longer than all of
// its checks.
#include "ops/reverse_step_class.h"

#include <ATen/core/grad_mode.h>
#include <c10/core/GradMode.h>

#include "ops/direct_call.h"
#include "ops/eager_reverse_step.h"
#include "ops/fastcall.h"

namespace py = pybind11;

namespace ddpm_ext {
namespace {

using fastcall::Argument;

// Functions in Python, for what is rare.
struct Callbacks {
  py::object split_t;         // (t) -> (None, int), or the error that says what is wrong with t
  py::object seed_in_memory;  // (device) -> a seed as a tensor, or None
  py::object timesteps;       // (row, batch, device) -> what a model is called with for an int t
  py::object unwrap;          // (what a model returned) -> its tensor
};

struct ReverseStep {
  Tensor table;
  double clip_min, clip_max;
  OptionalTensor noise;
  bool draw_noise;
  Rng rng;
  bool fresh;  // whether each call draws a seed of its own
  Callbacks callbacks;
  int64_t batch = -1;  // of the last call with an int t,
  py::object by_row;   // and what models were called with for such a batch, by t
};

// One sample's row for all, or each sample's.
struct Place {
  OptionalTensor row;
  int64_t index = 0;
};

const auto as_tensor = Argument<Tensor>::of;
const auto as_optional_tensor = Argument<OptionalTensor>::of;
const auto as_index = Argument<int64_t>::of;

// `t` is an int or a tensor. What else counts as an int, and the errors, are split_t's.
Place place_of(const Callbacks& callbacks, PyObject* t) {
  if (PyLong_CheckExact(t)) {
    int overflow = 0;
    const int64_t index = PyLong_AsLongLongAndOverflow(t, &overflow);
    if (overflow == 0) return {std::nullopt, index};
  } else if (THPVariable_Check(t)) {
    return {THPVariable_Unpack(t)};
  }
  const py::tuple split = callbacks.split_t(py::handle(t));
  return {std::nullopt, split[1].cast<int64_t>()};
}

void check_step(const ReverseStep& step, const Tensor& x_t, const Place& at, const OptionalTensor& out) {
  const Rng& rng = step.rng;
  eager::check_reverse_step(x_t, step.table, at.row, at.index, step.noise, step.draw_noise, rng.seed, rng.seed_value,
                            rng.sample_ids, rng.first_id, rng.stream, rng.draw, rng.draw_data, out);
}

// A new reference to the result, which is `out` itself unless that is None.
PyObject* take_step(const ReverseStep& step, PyObject* samples, const Tensor& x_t, const Tensor& model_output,
                    const Place& at, PyObject* out) {
  OptionalTensor seed = step.rng.seed;
  int64_t seed_value = step.rng.seed_value;
  if (step.fresh) {
    // A graph that is being captured, and modes and transforms of torch, may need one that torch's operators draw.
    if (!x_t.is_cpu() || !plain({{"x_t", x_t}})) {
      const py::object drawn = step.callbacks.seed_in_memory(py::handle(samples).attr("device"));
      seed = as_optional_tensor("seed", drawn.ptr());
    }
    if (!seed.has_value()) seed_value = draw_seed();
  }
  const OptionalTensor given = as_optional_tensor("out", out);
  Tensor result;
  {
    const fastcall::WithoutGil unlocked(!fastcall::is_brief(x_t));
    const Rng& rng = step.rng;
    result = eager::reverse_step(x_t, model_output, step.table, at.row, at.index, step.clip_min, step.clip_max,
                                 step.noise, step.draw_noise, seed, seed_value, rng.sample_ids, rng.first_id,
                                 rng.stream, rng.draw, rng.draw_data, given);
  }
  return given.has_value() ? Py_NewRef(out) : THPVariable_Wrap(std::move(result));
}

// What a model is called with beside samples: t itself if it is a tensor.
py::object timesteps_of(ReverseStep& step, PyObject* samples, const Tensor& x_t, const Place& at, PyObject* t) {
  if (at.row.has_value()) return py::reinterpret_borrow<py::object>(t);
  const int64_t batch = x_t.size(0);
  if (step.batch != batch) step.by_row = py::dict(), step.batch = batch;
  const py::object by_row = step.by_row;  // another thread's call may put one for another batch in its place
  const py::int_ row(at.index);
  if (PyObject* const found = PyDict_GetItemWithError(by_row.ptr(), row.ptr()))
    return py::reinterpret_borrow<py::object>(found);
  const py::object made = step.callbacks.timesteps(row, batch, py::handle(samples).attr("device"));
  if (THPVariable_CheckExact(made.ptr()) && plain({{"t", THPVariable_Unpack(made.ptr())}})) by_row[row] = made;
  return made;
}

// check(x_t, row, index, out): raises what take would raise.
PyObject* check(ReverseStep& step, PyObject* const* args) {
  const Tensor x_t = as_tensor("x_t", args[0]);
  const Place at{as_optional_tensor("t", args[1]), as_index("t", args[2])};
  check_step(step, x_t, at, as_optional_tensor("out", args[3]));
  return Py_NewRef(Py_None);
}

// take(x_t, model_output, row, index, out): the next samples.
PyObject* take(ReverseStep& step, PyObject* const* args) {
  const Tensor x_t = as_tensor("x_t", args[0]), model_output = as_tensor("model_output", args[1]);
  const Place at{as_optional_tensor("t", args[2]), as_index("t", args[3])};
  return take_step(step, args[0], x_t, model_output, at, args[4]);
}

// run(model, x_t, t, out, timesteps): the next samples by what model(x_t, timesteps) returns, all without recording
// gradients. Wrong arguments are errors before the model is called. If timesteps is None, they follow from t.
PyObject* run(ReverseStep& step, PyObject* const* args) {
  const at::NoGradGuard no_grad;
  PyObject *const samples = args[1], *const t = args[2], *const out = args[3];
  const Tensor x_t = as_tensor("x_t", samples);
  const Place at = place_of(step.callbacks, t);
  check_step(step, x_t, at, as_optional_tensor("out", out));
  const py::object timesteps =
      args[4] == Py_None ? timesteps_of(step, samples, x_t, at, t) : py::reinterpret_borrow<py::object>(args[4]);
  PyObject* of_model[] = {nullptr, samples, timesteps.ptr()};
  auto output = py::reinterpret_steal<py::object>(
      PyObject_Vectorcall(args[0], of_model + 1, 2 | PY_VECTORCALL_ARGUMENTS_OFFSET, nullptr));
  if (!output) throw py::error_already_set();
  c10::GradMode::set_enabled(false);  // a model may have switched them on
  if (!THPVariable_Check(output.ptr())) output = step.callbacks.unwrap(output);
  const Tensor model_output = as_tensor("model_output", output.ptr());
  return take_step(step, samples, x_t, model_output, at, out);
}

ReverseStep make(const Tensor& table, double clip_min, double clip_max, const OptionalTensor& noise, bool draw_noise,
                 DDPM_RNG_PARAMETERS, bool fresh, py::object split_t, py::object seed_in_memory, py::object timesteps,
                 py::object unwrap) {
  Callbacks callbacks{std::move(split_t), std::move(seed_in_memory), std::move(timesteps), std::move(unwrap)};
  return {table, clip_min, clip_max, noise, draw_noise, DDPM_RNG_STRUCT, fresh, std::move(callbacks)};
}

using Method = PyObject*(ReverseStep&, PyObject* const*);

template <Method* kMethod, Py_ssize_t kArguments>
PyObject* called(PyObject* self, PyObject* const* args, Py_ssize_t count) {
  return fastcall::guarded([=] {
    fastcall::check_count("ReverseStep", count, kArguments);
    void* const step = reinterpret_cast<py::detail::instance*>(self)->get_value_and_holder().value_ptr();
    TORCH_CHECK_TYPE(step != nullptr, "ReverseStep: __init__ was not called");
    return kMethod(*static_cast<ReverseStep*>(step), args);
  });
}

}  // namespace

void define_reverse_step(py::module_& m) {
  static PyMethodDef methods[] = {fastcall::definition("check", called<check, 4>),
                                  fastcall::definition("take", called<take, 5>),
                                  fastcall::definition("run", called<run, 5>)};
  py::class_<ReverseStep> type(m, "ReverseStep");
  type.def(py::init(&make));
  for (PyMethodDef& each : methods) {
    auto* const of = reinterpret_cast<PyTypeObject*>(type.ptr());
    type.attr(each.ml_name) = py::reinterpret_steal<py::object>(PyDescr_NewMethod(of, &each));
  }
}

}  // namespace ddpm_ext
