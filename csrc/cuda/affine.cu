#include "core/forward.h"
#include "cuda/elementwise.cuh"
#include "cuda/launch.h"

namespace ddpm_ext::cuda {
namespace {

struct Affine {
  using Row = AffineRow;
  static constexpr bool kX = true, kSecond = false, kRowless = false;

  static __device__ __forceinline__ bool draws(const Row&) { return true; }
  static __device__ __forceinline__ uint32_t draw(const Row&, int64_t t) { return static_cast<uint32_t>(t); }

  template <Noise kNoise, class F>
  static __device__ __forceinline__ F element(const Row& row, const Args&, F x, F, F z) {
    if constexpr (kNoise == Noise::none) return F(row.k0) * x;
    return affine(row, x, z);
  }
};

struct Randn {
  struct Row {};
  static constexpr bool kX = false, kSecond = false, kRowless = true;

  static __device__ __forceinline__ bool draws(const Row&) { return true; }
  static __device__ __forceinline__ uint32_t draw(const Row&, int64_t) { return 0; }

  template <Noise, class F>
  static __device__ __forceinline__ F element(const Row&, const Args&, F, F, F z) {
    return z;
  }
};

template <class X>
void launch_randn(const Args& args, cudaStream_t stream) {
  if (args.seed_data != nullptr) return launch_typed<Randn, Noise::drawn, true, X, X, X>(args, stream);
  return launch_typed<Randn, Noise::drawn, false, X, X, X>(args, stream);
}

}  // namespace

void affine(const Args& args, int device) {
  on_device(device, [&](cudaStream_t stream) {
    switch (args.x.dtype) {
      case DType::float16:
        return launch_noise<Affine, __half, __half, __half>(args, stream);
      case DType::bfloat16:
        return launch_noise<Affine, __nv_bfloat16, __nv_bfloat16, __nv_bfloat16>(args, stream);
      case DType::float32:
        if (args.noise_kind != Noise::given) return launch_noise<Affine, float, float, float>(args, stream);
        switch (args.noise.dtype) {
          case DType::float32:
            return launch_typed<Affine, Noise::given, false, float, float, float>(args, stream);
          case DType::float16:
            return launch_typed<Affine, Noise::given, false, float, float, __half>(args, stream);
          case DType::bfloat16:
            return launch_typed<Affine, Noise::given, false, float, float, __nv_bfloat16>(args, stream);
        }
    }
  });
}

void randn(const Args& args, int device) {
  on_device(device, [&](cudaStream_t stream) {
    switch (args.out.dtype) {
      case DType::float32:
        return launch_randn<float>(args, stream);
      case DType::float16:
        return launch_randn<__half>(args, stream);
      case DType::bfloat16:
        return launch_randn<__nv_bfloat16>(args, stream);
    }
  });
}

}  // namespace ddpm_ext::cuda
