// The Python module ddpm_ext._C: the operators for eager calls (ops/eager.h), and information about the build.
#include <ATen/SavedTensorHooks.h>
#include <ATen/ops/empty_like.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/utils/pybind.h>

#include "core/philox.h"
#include "core/step.h"
#include "cpu/operators.h"
#include "ops/direct_call.h"
#include "ops/eager.h"
#include "ops/result_memory.h"

namespace py = pybind11;
using at::Tensor;
using namespace py::literals;

namespace {

// Returns the four words of a Philox block, by the functions that the kernels use. Tests compare them with published
// values.
std::array<uint32_t, 4> philox4x32(std::array<uint32_t, 4> counter, std::array<uint32_t, 2> key) {
  const ddpm_ext::PhiloxKeys keys = ddpm_ext::philox_keys(key[0] | (uint64_t{key[1]} << 32));
  uint32_t w[4];
  ddpm_ext::philox_block(keys, ddpm_ext::philox_sample(keys, {counter[1], counter[2], counter[3]}), counter[0], w);
  return {w[0], w[1], w[2], w[3]};
}

#if defined(__clang__)
constexpr const char* kCompiler = "clang " __clang_version__;
#else
constexpr const char* kCompiler = "gcc " __VERSION__;
#endif

// Returns how this module was built, and the CPU instruction set that it uses.
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

// Returns an uninitialised tensor like `like`. Under torch's modes, and for tensor subclasses, torch must create it.
Tensor empty_result_like(const Tensor& like) {
  if (!ddpm_ext::plain({{"like", like}})) return at::empty_like(like);
  return ddpm_ext::empty_result_like(like, like.scalar_type());
}

py::dict result_memory() {
  const auto [limit, kept, kept_blocks, used] = ddpm_ext::result_memory();
  return py::dict("limit"_a = limit, "kept"_a = kept, "kept_blocks"_a = kept_blocks, "used"_a = used);
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  // Turns errors of torch, and of torch's modes in Python, into the Python errors that torch itself raises. pybind11
  // translates all other errors.
  py::register_local_exception_translator([](std::exception_ptr error) {
    try {
      if (error) std::rethrow_exception(error);
    } catch (const c10::Error&) {
      torch::translate_exception_to_python(error);
    } catch (const python_error&) {
      torch::translate_exception_to_python(error);
    }
  });
  using Unlocked = py::call_guard<py::gil_scoped_release>;
  ddpm_ext::eager::define(m);
  m.def("draw_seed", &ddpm_ext::draw_seed);
  // Torch 2.7 has no Python function for this.
  m.def("has_saved_tensors_hooks", [] { return at::SavedTensorDefaultHooks::get_hooks().has_value(); });
  m.def("philox4x32", &philox4x32);
  m.def("row_names",
        [] { return std::vector<std::string>(std::begin(ddpm_ext::kRowNames), std::end(ddpm_ext::kRowNames)); });
  m.def("build_info", &build_info);
  m.def("empty_result_like", &empty_result_like);
  m.def("result_memory", &result_memory);
  m.def("release_result_memory", &ddpm_ext::release_result_memory, Unlocked());
  m.def("limit_result_memory", &ddpm_ext::limit_result_memory, Unlocked());
}
