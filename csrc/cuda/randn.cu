// The noise contract's normals alone.
#include "cuda/elementwise.cuh"
#include "cuda/operators.h"

namespace ddpm_ext::cuda {
namespace {

struct Randn {
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

template <class X>
void launch_randn(const ElementwiseCall& call, cudaStream_t stream) {
  if (call.seed_data != nullptr) return launch_typed<Randn, Noise::drawn, true, X, X, X>(call, stream);
  return launch_typed<Randn, Noise::drawn, false, X, X, X>(call, stream);
}

}  // namespace

void randn(const ElementwiseCall& call, int device) {
  on_device(device, [&](cudaStream_t stream) {
    switch (call.out.dtype) {
      case DType::float32:
        return launch_randn<float>(call, stream);
      case DType::float16:
        return launch_randn<__half>(call, stream);
      case DType::bfloat16:
        return launch_randn<__nv_bfloat16>(call, stream);
    }
  });
}

}  // namespace ddpm_ext::cuda
