#include "core/step.h"
#include "cuda/elementwise.cuh"
#include "cuda/launch.h"

namespace ddpm_ext::cuda {
namespace {

struct ReverseStep {
  using Row = StepRow;
  static constexpr bool kX = true, kSecond = true, kRowless = false;

  static __device__ __forceinline__ bool draws(const Row& row) { return row.s != 0.0f; }
  static __device__ __forceinline__ uint32_t draw(const Row& row, int64_t) { return row.draw; }

  template <Noise kNoise, class F>
  static __device__ __forceinline__ F element(const Row& row, const Args& args, F x, F m, F z) {
    const F mean = step_mean(row, x, m, args.clip_min, args.clip_max);
    return kNoise == Noise::none ? mean : add_noise(row, mean, z);
  }
};

}  // namespace

void reverse_step(const Args& args, int device) {
  on_device(device, [&](cudaStream_t stream) {
    by_dtypes(args.x.dtype, args.model_output.dtype,
              [&](auto x, auto m) { launch_noise<ReverseStep, decltype(x), decltype(m), decltype(x)>(args, stream); });
  });
}

}  // namespace ddpm_ext::cuda
