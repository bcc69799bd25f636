// The forward process, the predicted clean sample and the posterior mean: operators that are affine in two tensors.
#include "core/forward.h"
#include "cuda/elementwise.cuh"
#include "cuda/operators.h"

namespace ddpm_ext::cuda {
namespace {

// The operator for the kernel template of elementwise.cuh, which describes the members.
struct Affine {
  using Call = ElementwiseCall;
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
    // The second tensor, `noise`, may have a lower precision than x. If the call has none, Z is the type of x.
    by_dtypes(call.x.dtype, call.noise_kind == Noise::given ? call.noise.dtype : call.x.dtype, [&](auto x, auto z) {
      using X = decltype(x);
      using Z = decltype(z);
      if constexpr (std::is_same_v<X, Z>) return launch_noise<Affine, X, X, X>(call, stream);
      return launch_typed<Affine, Noise::given, false, X, X, Z>(call, stream);
    });
  });
}

}  // namespace ddpm_ext::cuda
