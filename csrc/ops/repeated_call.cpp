// Questions that a loop asks in each of its steps, and that take longer in Python than a small step: whether the step
// is the next one of the loop before it, called with arguments of the same kinds, of an object that nobody has edited.
#include "ops/repeated_call.h"

#include <ATen/core/grad_mode.h>

#include "ops/direct_call.h"
#include "ops/fastcall.h"

namespace py = pybind11;

namespace ddpm_ext {
namespace {

const auto as_tensor = fastcall::Argument<Tensor>::of;

// A plain tensor's dtype, device and shape.
struct Kind {
  at::ScalarType dtype;
  at::Device device;
  c10::DimVector sizes;

  static Kind of(const Tensor& x) { return {x.scalar_type(), x.device(), c10::DimVector(x.sizes())}; }
  bool is_of(const Tensor& x) const {
    return x.scalar_type() == dtype && x.device() == device && x.sizes().equals(sizes);
  }
};

// The arguments of a step, and what must be as it was.
struct RepeatedCall {
  Kind output, sample;
  Tensor timesteps;                       // the object's own
  int64_t first;                          // the place of the loop's first row among them
  py::dict options;                       // the other arguments, none of them a tensor
  py::object watched, attributes, items;  // as unchanged takes them
};

// The index of the element of the vector `own` that `t` is a view of, or -1. Neither is read.
int64_t index_of(const Tensor& own, const Tensor& t) {
  if (own.dim() != 1 || t.numel() != 1 || t.scalar_type() != own.scalar_type()) return -1;
  if (!own.has_storage() || !t.has_storage() || !own.storage().is_alias_of(t.storage())) return -1;
  const int64_t offset = t.storage_offset() - own.storage_offset();
  const int64_t stride = own.size(0) == 0 || own.stride(0) == 0 ? 1 : own.stride(0);
  return offset >= 0 && offset % stride == 0 && offset / stride < own.size(0) ? offset / stride : -1;
}

bool are_equal(PyObject* one, PyObject* other) {
  const int equal = PyObject_RichCompareBool(one, other, Py_EQ);
  if (equal < 0) throw py::error_already_set();
  return equal == 1;
}

// Whether an object whose attributes are the dict `state` has the same tensors and settings as before, with the same
// contents. No tensor is read.
//   watched: tuples of an attribute's name, its value, and how often that had been written to; None: nobody knows.
//   attributes, items: those of its config.
bool unchanged(PyObject* state, PyObject* watched, PyObject* attributes, PyObject* items) {
  static PyObject* const config_name = PyUnicode_InternFromString("_internal_dict");
  static PyObject* const dict_name = PyUnicode_InternFromString("__dict__");
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(watched); ++i) {
    PyObject* const each = PyTuple_GET_ITEM(watched, i);
    PyObject *const value = PyTuple_GET_ITEM(each, 1), *const count = PyTuple_GET_ITEM(each, 2);
    PyObject* const found = PyDict_GetItemWithError(state, PyTuple_GET_ITEM(each, 0));
    if ((found == nullptr ? Py_None : found) != value) return false;
    if (count == Py_None) continue;
    const Tensor& tensor = THPVariable_Unpack(value);  // a copy that was made in inference mode counts nothing
    if (tensor.is_inference() || tensor._version() != PyLong_AsLongLong(count)) return false;
  }
  PyObject* const config = PyDict_GetItemWithError(state, config_name);
  if (config == nullptr || !are_equal(config, items)) return false;
  const auto own = py::reinterpret_steal<py::object>(PyObject_GetAttr(config, dict_name));
  if (!own) throw py::error_already_set();
  return are_equal(own.ptr(), attributes);
}

// What `unchanged` takes as `watched`: the attributes of these names, and the lists.
PyObject* watched(PyObject* state, PyObject* names) {
  const auto found = py::reinterpret_steal<py::object>(PyList_New(0));
  const auto add = [&found](PyObject* name, PyObject* value) {
    PyObject* const x = value == nullptr ? Py_None : value;
    const bool counts = THPVariable_Check(x) && !THPVariable_Unpack(x).is_inference();
    const auto count = py::reinterpret_steal<py::object>(
        counts ? PyLong_FromLongLong(static_cast<int64_t>(THPVariable_Unpack(x)._version())) : Py_NewRef(Py_None));
    const auto each = py::reinterpret_steal<py::object>(PyTuple_Pack(3, name, x, count.ptr()));
    if (!each || PyList_Append(found.ptr(), each.ptr()) < 0) throw py::error_already_set();
  };
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(names); ++i)
    add(PyTuple_GET_ITEM(names, i), PyDict_GetItemWithError(state, PyTuple_GET_ITEM(names, i)));
  Py_ssize_t position = 0;
  PyObject *name = nullptr, *value = nullptr;
  while (PyDict_Next(state, &position, &name, &value))
    if (PyList_CheckExact(value)) add(name, value);
  return PyList_AsTuple(found.ptr());
}

bool has_settings(const RepeatedCall& call, PyObject* state) {
  return unchanged(state, call.watched.ptr(), call.attributes.ptr(), call.items.ptr());
}

// The row of a timestep, or a negative number.
int64_t row_of(const RepeatedCall& call, PyObject* t) {
  if (!THPVariable_CheckExact(t)) return -1;
  const Tensor& timestep = THPVariable_Unpack(t);
  return timestep.dim() == 0 ? index_of(call.timesteps, timestep) - call.first : -1;
}

bool have_kinds(const RepeatedCall& call, PyObject* args, PyObject* options) {
  if (PyTuple_GET_SIZE(args) != 3) return false;
  PyObject *const output = PyTuple_GET_ITEM(args, 0), *const sample = PyTuple_GET_ITEM(args, 2);
  if (!THPVariable_CheckExact(output) || !THPVariable_CheckExact(sample)) return false;
  const Tensor &m = THPVariable_Unpack(output), &x = THPVariable_Unpack(sample);
  if (!plain({{"model_output", m}, {"sample", x}}) || !call.output.is_of(m) || !call.sample.is_of(x)) return false;
  if (at::GradMode::is_enabled() && (m.requires_grad() || x.requires_grad())) return false;
  if (PyDict_GET_SIZE(options) != PyDict_GET_SIZE(call.options.ptr())) return false;
  Py_ssize_t position = 0;
  PyObject *name = nullptr, *value = nullptr;
  while (PyDict_Next(options, &position, &name, &value))
    if (PyDict_GetItemWithError(call.options.ptr(), name) != value) return false;
  return true;
}

PyObject* as_bool(bool value) { return Py_NewRef(value ? Py_True : Py_False); }

const RepeatedCall& call_of(PyObject* self) {
  void* const call = reinterpret_cast<py::detail::instance*>(self)->get_value_and_holder().value_ptr();
  TORCH_CHECK_TYPE(call != nullptr, "RepeatedCall: repeated_call has not made it");
  return *static_cast<RepeatedCall*>(call);
}

// How often a tensor was written to; 0 for inference tensors, which do not count that.
int64_t written(const Tensor& x) { return x.is_inference() ? 0 : static_cast<int64_t>(x._version()); }

// written(x)
PyObject* called_written(PyObject*, PyObject* const* args, Py_ssize_t count) {
  return fastcall::guarded([=] {
    fastcall::check_count("written", count, 1);
    return PyLong_FromLongLong(written(as_tensor("x", args[0])));
  });
}

// is_unwritten(x, result, count): whether x is the very tensor `result`, which had been written to so often, and not
// since. Never for inference tensors.
PyObject* called_is_unwritten(PyObject*, PyObject* const* args, Py_ssize_t count) {
  return fastcall::guarded([=] {
    fastcall::check_count("is_unwritten", count, 3);
    if (args[0] != args[1]) return as_bool(false);
    const Tensor x = as_tensor("x", args[0]);
    return as_bool(!x.is_inference() && written(x) == fastcall::Argument<int64_t>::of("count", args[2]));
  });
}

// index_of(own, t), None for -1.
PyObject* called_index_of(PyObject*, PyObject* const* args, Py_ssize_t count) {
  return fastcall::guarded([=] {
    fastcall::check_count("index_of", count, 2);
    const int64_t index = index_of(as_tensor("own", args[0]), as_tensor("t", args[1]));
    return index < 0 ? Py_NewRef(Py_None) : PyLong_FromLongLong(index);
  });
}

// unchanged(state, watched, attributes, items)
PyObject* called_unchanged(PyObject*, PyObject* const* args, Py_ssize_t count) {
  return fastcall::guarded([=] {
    fastcall::check_count("unchanged", count, 4);
    return as_bool(unchanged(args[0], args[1], args[2], args[3]));
  });
}

// watched(state, names)
PyObject* called_watched(PyObject*, PyObject* const* args, Py_ssize_t count) {
  return fastcall::guarded([=] {
    fastcall::check_count("watched", count, 2);
    return watched(args[0], args[1]);
  });
}

// row_of(state, args, options): the row of a step with these arguments, None unless it is like the one before.
PyObject* called_row_of(PyObject* self, PyObject* const* args, Py_ssize_t count) {
  return fastcall::guarded([=] {
    fastcall::check_count("RepeatedCall.row_of", count, 3);
    const RepeatedCall& call = call_of(self);
    if (!have_kinds(call, args[1], args[2])) return Py_NewRef(Py_None);
    const int64_t row = row_of(call, PyTuple_GET_ITEM(args[1], 1));
    return row >= 0 && has_settings(call, args[0]) ? PyLong_FromLongLong(row) : Py_NewRef(Py_None);
  });
}

// is_at(row, state, timestep): whether that is the row's timestep, and nothing was edited.
PyObject* is_at(PyObject* self, PyObject* const* args, Py_ssize_t count) {
  return fastcall::guarded([=] {
    fastcall::check_count("RepeatedCall.is_at", count, 3);
    const RepeatedCall& call = call_of(self);
    const int64_t row = fastcall::Argument<int64_t>::of("row", args[0]);
    return as_bool(row_of(call, args[2]) == row && has_settings(call, args[1]));
  });
}

// repeated_call(args, options, timesteps, first, watched, attributes, items): a RepeatedCall; None where a step with
// these arguments may need another look at them.
PyObject* repeated_call(PyObject*, PyObject* const* args, Py_ssize_t count) {
  return fastcall::guarded([=] {
    fastcall::check_count("repeated_call", count, 7);
    for (Py_ssize_t i = 0; i < 3; ++i)
      if (!THPVariable_CheckExact(PyTuple_GET_ITEM(args[0], i))) return Py_NewRef(Py_None);
    const auto given = [=](Py_ssize_t i) -> const Tensor& { return THPVariable_Unpack(PyTuple_GET_ITEM(args[0], i)); };
    if (given(1).dim() != 0) return Py_NewRef(Py_None);
    auto options = py::reinterpret_steal<py::dict>(PyDict_Copy(args[1]));
    for (const auto& [name, value] : options)
      if (THPVariable_Check(value.ptr())) return Py_NewRef(Py_None);
    const auto borrowed = [=](Py_ssize_t i) { return py::reinterpret_borrow<py::object>(args[i]); };
    const int64_t first = fastcall::Argument<int64_t>::of("first", args[3]);
    RepeatedCall call{
        Kind::of(given(0)), Kind::of(given(2)), as_tensor("timesteps", args[2]), first, std::move(options), borrowed(4),
        borrowed(5),        borrowed(6)};
    return py::cast(std::move(call)).release().ptr();
  });
}

}  // namespace

void define_repeated_call(py::module_& m) {
  static PyMethodDef functions[] = {
      fastcall::definition("index_of", called_index_of), fastcall::definition("unchanged", called_unchanged),
      fastcall::definition("written", called_written),   fastcall::definition("is_unwritten", called_is_unwritten),
      fastcall::definition("watched", called_watched),   fastcall::definition("repeated_call", repeated_call)};
  for (PyMethodDef& each : functions)
    m.attr(each.ml_name) = py::reinterpret_steal<py::object>(PyCFunction_New(&each, nullptr));
  static PyMethodDef methods[] = {fastcall::definition("row_of", called_row_of), fastcall::definition("is_at", is_at)};
  py::class_<RepeatedCall> type(m, "RepeatedCall");
  for (PyMethodDef& each : methods) {
    auto* const of = reinterpret_cast<PyTypeObject*>(type.ptr());
    type.attr(each.ml_name) = py::reinterpret_steal<py::object>(PyDescr_NewMethod(of, &each));
  }
}

}  // namespace ddpm_ext
