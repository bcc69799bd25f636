// Functions as CPython itself calls them (METH_FASTCALL), and their arguments and results. pybind11 parses the
// arguments of an operator more slowly than a small tensor is computed.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <string>
#include <tuple>
#include <type_traits>
#include <utility>

#include "ops/operators.h"

namespace ddpm_ext::fastcall {

namespace py = pybind11;

// To let other Python threads run meanwhile takes longer than an operator on a CPU with at most as many elements.
constexpr int64_t kBrief = 8192;

inline bool is_brief(const Tensor& x) {
  return x.is_cpu() && !x.unsafeGetTensorImpl()->has_symbolic_sizes_strides() && x.numel() <= kBrief;
}

// Lets other Python threads run.
class WithoutGil {
 public:
  explicit WithoutGil(bool release) : state_(release ? PyEval_SaveThread() : nullptr) {}
  ~WithoutGil() {
    if (state_ != nullptr) PyEval_RestoreThread(state_);
  }
  WithoutGil(const WithoutGil&) = delete;
  WithoutGil& operator=(const WithoutGil&) = delete;

 private:
  PyThreadState* state_;
};

// Arguments of C++. Each raises a TypeError for a value of another type.
template <class T>
struct Argument {
  static T of(const char* name, PyObject* value) {
    if constexpr (std::is_same_v<T, int64_t>) {
      int overflow = 0;
      if (PyLong_CheckExact(value)) {
        const int64_t number = PyLong_AsLongLongAndOverflow(value, &overflow);
        if (overflow == 0) return number;
      }
    } else if constexpr (std::is_same_v<T, double>) {
      if (PyFloat_CheckExact(value)) return PyFloat_AS_DOUBLE(value);
    } else {
      static_assert(std::is_same_v<T, bool>);
      if (value == Py_True || value == Py_False) return value == Py_True;
    }
    py::detail::make_caster<T> caster;  // what else counts as one
    TORCH_CHECK_TYPE(caster.load(value, true), name, " is ", std::string(py::repr(value)), ", expected ",
                     std::is_same_v<T, int64_t> ? "an int64"
                     : std::is_same_v<T, bool>  ? "a bool"
                                                : "a float");
    return py::detail::cast_op<T>(caster);
  }
};

template <>
struct Argument<Tensor> {
  static Tensor of(const char* name, PyObject* value) {
    if (THPVariable_Check(value)) return THPVariable_Unpack(value);
    const std::string type = py::str(py::type::handle_of(value).attr("__name__"));
    TORCH_CHECK_TYPE(false, name, " is a ", type, ", expected a tensor");
  }
};

template <>
struct Argument<OptionalTensor> {
  static OptionalTensor of(const char* name, PyObject* value) {
    if (value == Py_None) return std::nullopt;
    return Argument<Tensor>::of(name, value);
  }
};

// The arguments that follow one another, the next one each time. A struct takes as many as it has fields.
struct Arguments {
  PyObject* const* next;

  template <class T>
  T take() {
    if constexpr (std::is_same_v<T, Rng>)
      return {take<OptionalTensor>(), take<int64_t>(), take<OptionalTensor>(), take<int64_t>(),
              take<int64_t>(),        take<int64_t>(), take<OptionalTensor>()};
    else if constexpr (std::is_same_v<T, Rows>)
      return {take<Tensor>(), take<OptionalTensor>(), take<int64_t>()};
    else if constexpr (std::is_same_v<T, NoiseSource>)
      return {take<OptionalTensor>(), take<bool>(), take<Rng>()};
    else
      return Argument<T>::of("an argument", *next++);
  }
};

template <class T>
constexpr size_t kFields = 1;
template <>
inline constexpr size_t kFields<Rng> = 7;
template <>
inline constexpr size_t kFields<Rows> = 3;
template <>
inline constexpr size_t kFields<NoiseSource> = 2 + kFields<Rng>;

// New references to results of C++.
inline PyObject* result(Tensor tensor) { return THPVariable_Wrap(std::move(tensor)); }

inline PyObject* result(std::tuple<Tensor, Tensor> tensors) {
  const auto first = py::reinterpret_steal<py::object>(result(std::move(std::get<0>(tensors))));
  const auto second = py::reinterpret_steal<py::object>(result(std::move(std::get<1>(tensors))));
  return PyTuple_Pack(2, first.ptr(), second.ptr());
}

// Returns what body() returns, a new reference; null with Python's error set if it throws.
template <class Body>
PyObject* guarded(Body body) {
  try {
    return body();
  } catch (py::error_already_set& error) {
    error.restore();
  } catch (...) {
    torch::translate_exception_to_python(std::current_exception());
  }
  return nullptr;
}

inline void check_count(const char* name, Py_ssize_t count, Py_ssize_t expected) {
  TORCH_CHECK_TYPE(count == expected, name, ": got ", count, " arguments, expected ", expected);
}

// How CPython calls a function: by position, and with names of the last arguments if it takes any.
using ByPosition = PyObject* (*)(PyObject*, PyObject* const*, Py_ssize_t);
using ByName = PyObject* (*)(PyObject*, PyObject* const*, Py_ssize_t, PyObject*);

template <class Convention>
PyMethodDef definition(const char* name, Convention function) {
  const auto detour = reinterpret_cast<void (*)()>(function);  // by which no compiler warns of the cast
  const int names = std::is_same_v<Convention, ByName> ? METH_KEYWORDS : 0;
  return {name, reinterpret_cast<PyCFunction>(detour), METH_FASTCALL | names, nullptr};
}

// An operator, whose first argument is a tensor, as a function of a module.
template <auto* kOperator>
struct Function;

template <class Result, class First, class... Rest, Result (*kOperator)(First, Rest...)>
struct Function<kOperator> {
  static constexpr size_t kCount = (kFields<std::decay_t<First>> + ... + kFields<std::decay_t<Rest>>);

  static inline PyMethodDef method = {};

  static PyObject* call(PyObject*, PyObject* const* args, Py_ssize_t count) {
    return guarded([=] {
      check_count(method.ml_name, count, kCount);
      Arguments each{args};
      // Braces, since they take the arguments in their order.
      const std::tuple<std::decay_t<First>, std::decay_t<Rest>...> arguments{each.take<std::decay_t<First>>(),
                                                                             each.take<std::decay_t<Rest>>()...};
      const auto run = [&] {
        const WithoutGil unlocked(!is_brief(std::get<0>(arguments)));
        return std::apply(*kOperator, arguments);
      };
      if constexpr (std::is_void_v<Result>) {
        run();
        return Py_NewRef(Py_None);
      } else {
        return result(run());
      }
    });
  }

  static void define(py::module_& m, const char* name) {
    method = definition(name, &call);
    const py::object module_name = m.attr("__name__");
    m.attr(name) = py::reinterpret_steal<py::object>(PyCFunction_NewEx(&method, nullptr, module_name.ptr()));
  }
};

}  // namespace ddpm_ext::fastcall
