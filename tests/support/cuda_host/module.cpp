// Two Python modules in one library. `operators` is csrc/ops/bindings.cpp with the CUDA kernels in place of the CPU
// kernels, so its functions take the arguments of ddpm_ext._C's. `control`, in this file, changes the settings of the
// stand-in and reads its records.
#include <torch/csrc/utils/pybind.h>

#include <optional>
#include <tuple>
#include <type_traits>
#include <utility>

#include "c10/cuda/CUDACachingAllocator.h"
#include "c10/cuda/CUDAGraphsC10Utils.h"
#include "c10/cuda/CUDAStream.h"
#include "control.h"
#include "core/box_muller.h"
#include "cpu/operators.h"
#include "cuda/access.cuh"
#include "cuda/operators.h"
#include "cuda/ptx.cuh"
#include "ops/operators.h"
#include "probe.h"
#include "standin/intrinsics.h"

namespace py = pybind11;
using at::Tensor;
using ddpm_ext::OptionalTensor;

namespace {

// Tensors by which `run` replaces arguments or the result of a call. If t, sample_ids, seed and draw are CPU tensors,
// an operator checks the values of t and sample_ids, and passes seed and draw to the kernel by value. These
// replacements reach the kernel as addresses of unchecked values, as tensors in GPU memory would. `out` replaces the
// result that the operator of an ElementwiseCall allocates.
struct Instead {
  OptionalTensor t, sample_ids, seed, out, draw;
} instead;

bool took_vectors;  // whether the last call of `run` allowed Access::vector (cuda/access.cuh)

// Runs the CUDA kernels of a call, after the replacements of its arguments.
template <class AnyCall>
void run(void (*kernels)(const AnyCall&, int), AnyCall call) {
  if (instead.t) call.t = instead.t->const_data_ptr<int64_t>(), call.t_stride = instead.t->stride(0);
  if (instead.sample_ids) {
    call.sample_ids = instead.sample_ids->const_data_ptr<int64_t>();
    call.ids_stride = instead.sample_ids->stride(0);
  }
  if (instead.seed) call.seed_data = instead.seed->const_data_ptr<int64_t>();
  if (instead.draw) call.draw_data = instead.draw->const_data_ptr<int64_t>();
  if constexpr (std::is_same_v<AnyCall, ddpm_ext::ElementwiseCall>) {
    if (instead.out) {  // the samples of `out` have the layout of the result that was allocated
      call.out.data = instead.out->mutable_data_ptr();
      call.out.batch_stride = instead.out->stride(0);
    }
  }
  took_vectors = ddpm_ext::cuda::choose_access(call) == ddpm_ext::cuda::Access::vector;
  kernels(call, standin::control.device);
}

Tensor randn(std::vector<int64_t> size, const OptionalTensor& seed, int64_t seed_value,
             const OptionalTensor& sample_ids, int64_t first_id, int64_t stream, int64_t draw,
             const OptionalTensor& draw_data, at::ScalarType dtype) {
  return ddpm_ext::randn(size, {seed, seed_value, sample_ids, first_id, stream, draw, draw_data}, dtype, at::kCPU);
}

py::list take_launches() {
  py::list result;
  for (const standin::Launch& l : standin::control.launches)
    result.append(
        py::make_tuple(py::make_tuple(l.grid.x, l.grid.y, l.grid.z), py::make_tuple(l.block.x, l.block.y, l.block.z)));
  standin::control.launches.clear();
  return result;
}

// Returns and clears the records of launches, memsets and allocations (control.h): the stream, as a number, and the
// device of each.
std::vector<std::tuple<intptr_t, int>> take_works() {
  std::vector<std::tuple<intptr_t, int>> result;
  for (const standin::Work& work : std::exchange(standin::control.works, {}))
    result.emplace_back(reinterpret_cast<intptr_t>(work.stream), work.device);
  return result;
}

// Calls run(). Returns the numbers of sectors that kernels loaded and stored meanwhile (control.h).
std::tuple<int64_t, int64_t> sectors_of(const py::function& run) {
  standin::control.sectors = {};
  standin::control.counts_sectors = true;
  run();
  standin::control.counts_sectors = false;
  return {standin::control.sectors.loaded, standin::control.sectors.stored};
}

// Returns for how many of the `count` words first, first + step, and so on the CUDA kernels compute another radius than
// the scalar code (core/box_muller.h).
int64_t radius_mismatches(uint32_t first, uint32_t step, int64_t count) {
  int64_t mismatches = 0;
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t w = first + static_cast<uint32_t>(i) * step;
    if (ddpm_ext::float_to_bits(ddpm_ext::radius(w)) != ddpm_ext::float_to_bits(probe::radius(w))) ++mismatches;
  }
  return mismatches;
}

// Returns the normals of the Philox blocks `first` to first + count - 1, computed by the scalar code.
std::vector<float> normals(uint64_t seed, uint64_t id, uint32_t stream, uint32_t draw, uint32_t first, int count) {
  const ddpm_ext::PhiloxKeys keys = ddpm_ext::philox_keys(seed);
  const ddpm_ext::PhiloxSample sample = ddpm_ext::philox_sample(keys, ddpm_ext::sample_counter(id, stream, draw));
  std::vector<float> z(4 * static_cast<size_t>(count));
  for (int i = 0; i < count; ++i) {
    uint32_t w[4];
    ddpm_ext::philox_block(keys, sample, first + static_cast<uint32_t>(i), w);
    ddpm_ext::box_muller(w[0], w[1], z[4 * i], z[4 * i + 1]);
    ddpm_ext::box_muller(w[2], w[3], z[4 * i + 2], z[4 * i + 3]);
  }
  return z;
}

}  // namespace

namespace ddpm_ext::cpu {

void reverse_step(const ReverseStepCall& call) { run(cuda::reverse_step, call); }
void step_with_options(const StepCall& call) { run(cuda::step_with_options, call); }
void affine(const ElementwiseCall& call) { run(cuda::affine, call); }
void randn(const ElementwiseCall& call) { run(cuda::randn, call); }
void loss(const LossCall& call) { cuda::loss(call, standin::control.device); }
void output_scale(const OutputScaleCall& call) { cuda::output_scale(call, standin::control.device); }
void x_start_scale(const XStartScaleCall& call) { cuda::x_start_scale(call, standin::control.device); }
int64_t x_start_scale_scratch(int64_t batch, int64_t numel) { return cuda::x_start_scale_scratch(batch, numel); }
const char* instruction_set() { return "cuda"; }

}  // namespace ddpm_ext::cpu

PYBIND11_MODULE(control, m) {
  using standin::control;
  m.def("randn", &randn);
  m.def("instead", [](OptionalTensor t, OptionalTensor sample_ids, OptionalTensor seed, OptionalTensor out,
                      OptionalTensor draw) { instead = {t, sample_ids, seed, out, draw}; });
  m.def("took_vectors", [] { return took_vectors; });
  m.def("take_launches", &take_launches);
  m.def("take_works", &take_works);
  m.def("sectors_of", &sectors_of);
  m.def("set_device", [](int device) { control.device = device; });
  m.def("set_seed", [](uint64_t seed) { control.seed = seed; });
  m.def("set_blocks", [](std::optional<std::vector<uint64_t>> blocks) { control.blocks = blocks; });
  m.def("set_refuse", [](bool refuse) { control.refuse = refuse; });
  m.def("set_seconds", [](int seconds) { control.seconds = seconds; });
  m.def("set_full", [](int calls) { control.full = calls; });
  m.def("set_capturing", [](bool capturing) { standin::capturing = capturing; });
  m.def("set_streams", [](int streams) { standin::streams = static_cast<standin::Streams>(streams); });
  m.def("current_stream", [](int device) { return reinterpret_cast<intptr_t>(standin::current_stream(device)); });
  m.def("set_current_device", [](int device) { standin::current_device = device; });
  m.def("current_device", [] { return standin::current_device; });
  m.def("allocations", [] { return standin::allocations; });
  m.def("blocks_of_allocator", [] { return standin::of_allocator.size(); });
  m.def("overwrite_memory_of_allocator", &standin::overwrite_memory_of_allocator);
  m.def("caches_emptied", [] { return standin::caches_emptied; });
  m.def("set_rsqrt", [](int choice) { standin::rsqrt_choice = static_cast<standin::Rsqrt>(choice); });
  m.def("rsqrt", &ddpm_ext::cuda::rsqrt_approx);
  m.def("normals", &normals);
  m.def("radius_mismatches", &radius_mismatches);
  m.def("poison", [](uintptr_t p, size_t size) { standin::poison(reinterpret_cast<void*>(p), size); });
  m.def("unpoison", [](uintptr_t p, size_t size) { standin::unpoison(reinterpret_cast<void*>(p), size); });
  m.def("roots_from_every_start", &probe::roots_from_every_start);
  m.def("order_of_threads", &probe::order_of_threads);
  m.def("run_kernel", &probe::run_kernel);
}
