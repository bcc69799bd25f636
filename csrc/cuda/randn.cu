// Draws standard normals: the noise of core/philox.h and core/box_muller.h as a tensor.
#include "cuda/elementwise.cuh"
#include "cuda/operators.h"

namespace ddpm_ext::cuda {
namespace {

// The operator for the kernel template of elementwise.cuh, which describes the members.
struct Randn {
  using Call = ElementwiseCall;
  struct Row {};
  static constexpr bool kX = false, kSecond = false, kRowless = true, kDraws = true;

  static __device__ __forceinline__ uint32_t draw(const Row&, int64_t) { return 0; }

  template <class F>
  static __device__ __forceinline__ F mean(const Row&, const ElementwiseCall&, F, F) {
    return F(0.0f);
  }
  template <class F>
  static __device__ __forceinline__ F noisy(const Row&, F, F, F z) {
    return z;
  }
};

}  // namespace

void randn(const ElementwiseCall& call, int device) {
  on_device(device, [&](cudaStream_t stream) {
    by_dtypes(call.out.dtype, call.out.dtype, [&](auto x, auto) {
      using X = decltype(x);
      if (call.seed_data != nullptr) return launch_typed<Randn, Noise::drawn, true, X, X, X>(call, stream);
      launch_typed<Randn, Noise::drawn, false, X, X, X>(call, stream);
    });
  });
}

}  // namespace ddpm_ext::cuda
