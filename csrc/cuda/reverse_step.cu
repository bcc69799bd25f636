// The reverse step: computes core/step.h for every element of the samples.
#include "core/step.h"

#include "cuda/elementwise.cuh"
#include "cuda/operators.h"

namespace ddpm_ext::cuda {
namespace {

// The operator for the kernel template of elementwise.cuh, which describes the members.
struct ReverseStep {
  using Call = ReverseStepCall;
  using Row = StepRow;
  static constexpr bool kX = true, kSecond = true, kRowless = false, kDraws = false;

  static __device__ __forceinline__ bool draws(const Row& row) { return row.s != 0.0f; }
  static __device__ __forceinline__ uint32_t draw(const Row& row, int64_t) { return row.draw; }

  template <class F>
  static __device__ __forceinline__ F mean(const Row& row, const ElementwiseCall& call, F x, F m) {
    return step_mean(row, x, m, call.clip_min, call.clip_max);
  }
  template <class F>
  static __device__ __forceinline__ F noisy(const Row& row, F mean, F, F z) {
    return add_noise(row, mean, z);
  }
};

}  // namespace

void reverse_step(const ReverseStepCall& call, int device) {
  on_device(device, [&](cudaStream_t stream) {
    by_dtypes(call.x.dtype, call.model_output.dtype,
              [&](auto x, auto m) { launch_noise<ReverseStep, decltype(x), decltype(m), decltype(x)>(call, stream); });
  });
}

}  // namespace ddpm_ext::cuda
