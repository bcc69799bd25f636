// Variants of the reverse step of which only a measurement on a card can say whether they are faster: see variants.py.
// Each is a struct with what it changes (cuda/elementwise.cuh), so that the operator itself stays as it is.
#include <exception>
#include <string>

#include "cuda/reverse_step.cuh"

namespace ddpm_ext::cuda {
namespace {

struct FiveBlocks : ReverseStep {
  static constexpr int kBlocks = 5;
};

struct RowCall : ElementwiseCall {
  StepRow row;
};

struct RowByValue : ReverseStep {
  using Call = RowCall;
};

struct NoiseAhead : RowByValue {
  static constexpr bool kAhead = true;
};

template <class Op, class X>
void launch_variant(RowCall call, cudaStream_t stream) {
  constexpr auto kKernel = elementwise<Op, Noise::drawn, false, Access::vector, X, X, X>;
  using Body = Elementwise<Op, Noise::drawn, false, Access::vector, X, X, X>;
  const Shape shape = launch_shape(call.batch, call.numel, Body::kItems, blocks_at_once<kKernel>(kThreads));
  cudaLaunchAttribute early = {};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = shape.grid, config.blockDim = shape.block, config.stream = stream;
  config.attrs = &early, config.numAttrs = Body::kAhead ? 1 : 0;
  const typename Body::Call& own = call;
  C10_CUDA_CHECK(cudaLaunchKernelEx(&config, kKernel, own, Dividers(call), philox_keys(call.seed)));
}

template <class X>
void launch_number(int variant, const RowCall& call, cudaStream_t stream) {
  switch (variant) {
    case 0:
      return launch_variant<ReverseStep, X>(call, stream);
    case 1:
      return launch_variant<FiveBlocks, X>(call, stream);
    case 2:
      return launch_variant<RowByValue, X>(call, stream);
    default:
      return launch_variant<NoiseAhead, X>(call, stream);
  }
}

}  // namespace
}  // namespace ddpm_ext::cuda

// x, model_output and out: contiguous (batch, numel), all float32 or all bfloat16, aligned to 16 bytes. `table` is on
// the device, and its row t is `row` on the host. Returns null, or what went wrong.
extern "C" __attribute__((visibility("default"))) const char* ddpm_ext_variant(
    int variant, void* x, void* model_output, void* out, int bfloat16, int64_t batch, int64_t numel, const void* table,
    int64_t rows, int64_t t, const float* row, float clip_min, float clip_max, uint64_t seed, void* stream) {
  namespace cuda = ddpm_ext::cuda;
  static std::string error;
  cuda::RowCall call;
  const ddpm_ext::DType dtype = bfloat16 ? ddpm_ext::DType::bfloat16 : ddpm_ext::DType::float32;
  const auto tensor = [&](void* data) { return ddpm_ext::TensorArg{data, dtype, numel, {1}}; };
  call.x = tensor(x), call.model_output = tensor(model_output), call.out = tensor(out);
  call.batch = batch, call.numel = numel, call.dims = 1, call.sizes[0] = numel, call.contiguous = true;
  call.table = table, call.rows = rows, call.t_index = t;
  call.clip_min = clip_min, call.clip_max = clip_max;
  call.noise_kind = ddpm_ext::Noise::drawn, call.seed = seed, call.draw = -1;
  memcpy(&call.row, row, sizeof call.row);
  if (cuda::choose_access(call) != cuda::Access::vector) return "the tensors are not aligned, or too large";
  try {
    const auto to = static_cast<cudaStream_t>(stream);
    bfloat16 ? cuda::launch_number<__nv_bfloat16>(variant, call, to) : cuda::launch_number<float>(variant, call, to);
    return nullptr;
  } catch (const std::exception& problem) {
    error = problem.what();
    return error.c_str();
  }
}
