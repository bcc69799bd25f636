// The forward process, the predicted clean sample and the posterior mean: operators that are affine in two tensors.
#include "core/forward.h"
#include "cuda/elementwise.cuh"
#include "cuda/operators.h"

namespace ddpm_ext::cuda {
namespace {

struct Affine {
  using Row = AffineRow;
  static constexpr bool kX = true, kSecond = false, kRowless = false, kDraws = true;

  static __device__ __forceinline__ uint32_t draw(const Row&, int64_t t) { return static_cast<uint32_t>(t); }

  template <class F>
  static __device__ __forceinline__ F mean(const Row& row, const ElementwiseCall&, F x, F) {
    return F(row.k0) * x;
  }
  template <class F>
  static __device__ __forceinline__ F noisy(const Row& row, F, F x, F z) {
    return affine(row, x, z);
  }
};

}  // namespace

void affine(const ElementwiseCall& call, int device) {
  on_device(device, [&](cudaStream_t stream) {
    switch (call.x.dtype) {
      case DType::float16:
        return launch_noise<Affine, __half, __half, __half>(call, stream);
      case DType::bfloat16:
        return launch_noise<Affine, __nv_bfloat16, __nv_bfloat16, __nv_bfloat16>(call, stream);
      case DType::float32:
        if (call.noise_kind != Noise::given) return launch_noise<Affine, float, float, float>(call, stream);
        switch (call.noise.dtype) {
          case DType::float32:
            return launch_typed<Affine, Noise::given, false, float, float, float>(call, stream);
          case DType::float16:
            return launch_typed<Affine, Noise::given, false, float, float, __half>(call, stream);
          case DType::bfloat16:
            return launch_typed<Affine, Noise::given, false, float, float, __nv_bfloat16>(call, stream);
        }
    }
  });
}

}  // namespace ddpm_ext::cuda
