// One kernel template for the reverse step, the affine operators and randn. A thread takes kItems consecutive elements
// of a sample and thus whole blocks of Philox, whatever the launch's shape. Grid and block are (elements, samples).
#pragma once

#include <type_traits>

#include "cuda/access.cuh"
#include "cuda/launch.cuh"
#include "cuda/memory.cuh"
#include "cuda/normals.cuh"
#include "cuda/sample.cuh"

namespace ddpm_ext::cuda {

// What a thread does for one sample. Op is an operator with these members:
//   Row                                        the row of its table; kRowless says that it has none
//   kX, kSecond                                whether it reads x, and a second tensor besides the noise
//   draws(row)                                 whether a row needs the drawn noise
//   draw(row, t)                               the draw to use if the caller gave none
//   element<kNoise>(row, call, x, second, z)   its arithmetic
template <class Op, Noise kNoise, bool kDeviceSeed, Access kAccess, class X, class M, class Z>
class Elementwise {
 public:
  using Index = std::conditional_t<kAccess == Access::vector, uint32_t, int64_t>;
  static constexpr bool kNarrow =
      sizeof(X) == 2 || (Op::kSecond && sizeof(M) == 2) || (kNoise == Noise::given && sizeof(Z) == 2);
  // With 8 items a load of a 16-bit type has 128 bits, and two blocks of Philox share the cost of a turn of the loop.
  static constexpr int kItems = kAccess == Access::vector && (kNarrow || kNoise == Noise::drawn) ? 8 : 4;

  // Finds everything that the sample's elements share.
  __device__ __forceinline__ Elementwise(const ElementwiseCall& call, const Dividers& dividers, const PhiloxKeys& keys,
                                         Index b)
      : call_(call),
        dividers_(dividers),
        keys_(keys),
        x_(static_cast<const X*>(call.x.data) + sample_start(call.x.batch_stride, b)),
        m_(static_cast<const M*>(call.model_output.data) + sample_start(call.model_output.batch_stride, b)),
        noise_(static_cast<const Z*>(call.noise.data) + sample_start(call.noise.batch_stride, b)),
        out_(static_cast<X*>(call.out.data) + sample_start(call.out.batch_stride, b)) {
    const int64_t t = sample_row(call, b);
    if constexpr (!Op::kRowless) row_ = static_cast<const Row*>(call.table)[t];
    if constexpr (kNoise == Noise::drawn) counter_ = sample_noise(call, keys, b, Op::draw(row_, t));
  }

  // Processes elements first to first + kItems, and so on in steps of `step`.
  __device__ __forceinline__ void run(Index first, Index step) const {
    // As on the CPU, nothing is added in a row without noise: adding zero would turn -0 into 0.
    if (kNoise == Noise::drawn && !Op::draws(row_)) {
      loop<Noise::none>(first, step);
    } else {
      loop<kNoise>(first, step);
    }
  }

 private:
  using Row = typename Op::Row;

  // kHere is kNoise, or none for a row that needs no noise.
  template <Noise kHere>
  __device__ __forceinline__ void loop(Index j, Index step) const {
    const Index numel = static_cast<Index>(call_.numel);
    if constexpr (kAccess == Access::vector) {
      const Index whole = numel / kItems * kItems;
      const X* const x = in_register(x_);
      const M* const m = in_register(m_);
      const Z* const noise = in_register(noise_);
      X* const out = in_register(out_);
      if (j < whole) {
        do items<kHere>(x, m, noise, out, j);
        while ((j += step) < whole);
      }
      for (; j < numel; ++j) {  // the rest of a sample that is no multiple of kItems, for one thread
        F2 z[2] = {};
        if constexpr (kHere == Noise::drawn) draw_normals(keys_, counter_, j, z);
        const F2 half = j & 2 ? z[1] : z[0];
        element<kHere>({j, j, j, j}, j & 1 ? half.v.y : half.v.x);
      }
    } else {
      for (; j < numel; j += step) {
        F2 z[2] = {};
        if constexpr (kHere == Noise::drawn) draw_normals(keys_, counter_, j, z);
        int64_t left;
        const Offsets first = offsets(call_, dividers_, j, left);
        DDPM_UNROLL
        for (int i = 0; i < kItems; ++i) {
          if (j + i >= numel) break;
          Offsets o = first;
          if (int64_t unused; i < left)
            o.add(call_, call_.dims - 1, i);
          else
            o = offsets(call_, dividers_, j + i, unused);
          element<kHere>(o, i % 2 == 0 ? z[i / 2].v.x : z[i / 2].v.y);
        }
      }
    }
  }

  // Processes elements j to j + kItems. The loads are issued first, so that the noise is drawn while they are in
  // flight.
  template <Noise kHere>
  __device__ __forceinline__ void items(const X* x, const M* m, const Z* noise, X* out, Index j) const {
    Vector<X, kItems> xs, outs;
    Vector<M, kItems> ms;
    Vector<Z, kItems> zs;
    if constexpr (Op::kX) xs.load(x + j);
    if constexpr (Op::kSecond) ms.load(m + j);
    if constexpr (kHere == Noise::given) zs.load(noise + j);
    DDPM_UNROLL
    for (int q = 0; q < kItems; q += 4) {
      F2 z[2] = {};
      if constexpr (kHere == Noise::drawn) draw_normals(keys_, counter_, j + q, z);
      DDPM_UNROLL
      for (int p = 0; p < 2; ++p) {
        const int i = q / 2 + p;
        F2 xi = {}, mi = {};
        if constexpr (Op::kX) xi = widen(xs.pairs[i]);
        if constexpr (Op::kSecond) mi = widen(ms.pairs[i]);
        if constexpr (kHere == Noise::given) z[p] = widen(zs.pairs[i]);
        narrow(Op::template element<kHere>(row_, call_, xi, mi, z[p]), outs.pairs[i]);
      }
    }
    outs.store(out + j);
  }

  template <Noise kHere>
  __device__ __forceinline__ void element(const Offsets& o, float z) const {
    const float x = Op::kX ? to_float(x_[o.x]) : 0.0f;
    const float m = Op::kSecond ? to_float(m_[o.model_output]) : 0.0f;
    if constexpr (kHere == Noise::given) z = to_float(noise_[o.noise]);
    out_[o.out] = from_float<X>(Op::template element<kHere>(row_, call_, x, m, z));
  }

  const ElementwiseCall& call_;
  const Dividers& dividers_;
  const PhiloxKeys& keys_;
  const X* const x_;
  const M* const m_;
  const Z* const noise_;
  X* const out_;
  Row row_{};
  PhiloxSample counter_{};
};

template <class Op, Noise kNoise, bool kDeviceSeed, Access kAccess, class X, class M, class Z>
__global__ void __launch_bounds__(kThreads)
    elementwise(const __grid_constant__ ElementwiseCall call, const __grid_constant__ Dividers dividers,
                const __grid_constant__ PhiloxKeys host_keys) {
  using Body = Elementwise<Op, kNoise, kDeviceSeed, kAccess, X, M, Z>;
  using Index = typename Body::Index;
  const Index b = static_cast<Index>(blockIdx.z * gridDim.y + blockIdx.y) * blockDim.y + threadIdx.y;
  if (b >= static_cast<Index>(call.batch)) return;
  PhiloxKeys keys;
  if constexpr (kDeviceSeed) keys = philox_keys(static_cast<uint64_t>(*call.seed_data));
  const Body body(call, dividers, kDeviceSeed ? keys : host_keys, b);
  const Index first = static_cast<Index>(blockIdx.x) * blockDim.x + threadIdx.x;
  body.run(first * Body::kItems, static_cast<Index>(gridDim.x) * blockDim.x * Body::kItems);
}

template <class Op, Noise kNoise, bool kDeviceSeed, Access kAccess, class X, class M, class Z>
void launch_access(const ElementwiseCall& call, cudaStream_t stream) {
  using Body = Elementwise<Op, kNoise, kDeviceSeed, kAccess, X, M, Z>;
  const Shape shape = launch_shape(call.batch, call.numel, Body::kItems);
  cudaLaunchConfig_t config = {};
  config.gridDim = shape.grid;
  config.blockDim = shape.block;
  config.stream = stream;
  C10_CUDA_CHECK(cudaLaunchKernelEx(&config, elementwise<Op, kNoise, kDeviceSeed, kAccess, X, M, Z>, call,
                                    Dividers(call), philox_keys(call.seed)));
}

template <class Op, Noise kNoise, bool kDeviceSeed, class X, class M, class Z>
void launch_typed(const ElementwiseCall& call, cudaStream_t stream) {
  switch (choose_access(call)) {
    case Access::vector:
      return launch_access<Op, kNoise, kDeviceSeed, Access::vector, X, M, Z>(call, stream);
    case Access::strided:
      return launch_access<Op, kNoise, kDeviceSeed, Access::strided, X, M, Z>(call, stream);
  }
}

// X is the type of x and out, M that of the second tensor, Z that of given noise.
template <class Op, class X, class M, class Z>
void launch_noise(const ElementwiseCall& call, cudaStream_t stream) {
  switch (call.noise_kind) {
    case Noise::none:
      return launch_typed<Op, Noise::none, false, X, M, Z>(call, stream);
    case Noise::given:
      return launch_typed<Op, Noise::given, false, X, M, Z>(call, stream);
    case Noise::drawn:
      if (call.seed_data != nullptr) return launch_typed<Op, Noise::drawn, true, X, M, Z>(call, stream);
      return launch_typed<Op, Noise::drawn, false, X, M, Z>(call, stream);
  }
}

}  // namespace ddpm_ext::cuda
