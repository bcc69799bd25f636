// One kernel template for every operator: a thread takes kItems consecutive elements of a sample, so whole blocks of
// Philox, whatever the launch's shape. Grid and block are (elements, samples).
#pragma once

#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <algorithm>

#include "core/normal.h"
#include "core/philox.h"
#include "cuda/memory.cuh"

namespace ddpm_ext::cuda {

constexpr int kThreads = 256;

// How a kernel reaches memory: 128 bits at a time, or element by element, with 32 or 64 bits for the element's number.
enum class Access { vector, strided32, strided64 };

// Op: kX and kSecond say whether it reads x and a second tensor besides the noise, Row is its table's row,
// element<kNoise>(row, args, x, second, z) its arithmetic, draws(row) whether a row needs drawn noise at all, and
// draw(row, t) which draw it takes where the caller gave none.
template <class Op, Noise kNoise, bool kDeviceSeed, Access kAccess, class X, class M, class Z>
struct Elementwise {
  using Row = typename Op::Row;
  static constexpr bool kNarrow =
      sizeof(X) == 2 || (Op::kSecond && sizeof(M) == 2) || (kNoise == Noise::given && sizeof(Z) == 2);
  static constexpr int kItems = kNarrow ? 8 : 4;  // so that each load of the narrowest type is 128 bits

  static __device__ __forceinline__ void draw(const PhiloxKeys& keys, const SampleCounter& counter, uint32_t block,
                                              float (&z)[kItems]) {
    const PhiloxSample sample = philox_sample(keys, counter);
    DDPM_UNROLL
    for (int q = 0; q < kItems / 4; ++q) {
      uint32_t w[4];
      philox_block(keys, sample, block + q, w);
      box_muller(w[0], w[1], z[4 * q], z[4 * q + 1]);
      box_muller(w[2], w[3], z[4 * q + 2], z[4 * q + 3]);
    }
  }

  // Elements j to j + kItems of sample b.
  static __device__ __forceinline__ void run(const Args& args, const PhiloxKeys& keys, int64_t b, int64_t j) {
    int64_t t = args.t != nullptr ? args.t[b * args.t_stride] : args.t_index;
    t = t < 0 ? 0 : t >= args.rows ? args.rows - 1 : t;  // a t on the GPU was not read back to be checked
    Row row{};
    if constexpr (!Op::kRowless) row = static_cast<const Row*>(args.table)[t];

    float z[kItems] = {};
    bool draws = false;
    if constexpr (kNoise == Noise::drawn) {
      draws = Op::draws(row);
      if (draws) {
        const uint64_t id = args.sample_ids != nullptr ? args.sample_ids[b * args.ids_stride] : args.first_id + b;
        const uint32_t number = args.draw >= 0 ? static_cast<uint32_t>(args.draw) : Op::draw(row, t);
        draw(keys, sample_counter(id, args.stream, number), static_cast<uint32_t>(j >> 2), z);
      }
    }

    const X* x = static_cast<const X*>(args.x.data) + b * args.x.batch_stride;
    const M* m = static_cast<const M*>(args.model_output.data) + b * args.model_output.batch_stride;
    const Z* noise = static_cast<const Z*>(args.noise.data) + b * args.noise.batch_stride;
    X* out = static_cast<X*>(args.out.data) + b * args.out.batch_stride;

    // As on the CPU, a row without noise has none added: not even zero, which would turn -0 into 0.
    auto element = [&](float xi, float mi, float zi) {
      return kNoise == Noise::drawn && !draws ? Op::template element<Noise::none>(row, args, xi, mi, zi)
                                              : Op::template element<kNoise>(row, args, xi, mi, zi);
    };

    if (kAccess == Access::vector && j + kItems <= args.numel) {
      float xs[kItems] = {}, ms[kItems] = {};
      if constexpr (Op::kX) load_vector(x + j, xs);
      if constexpr (Op::kSecond) load_vector(m + j, ms);
      if constexpr (kNoise == Noise::given) load_vector(noise + j, z);
      DDPM_UNROLL
      for (int i = 0; i < kItems; ++i) xs[i] = element(xs[i], ms[i], z[i]);
      store_vector(out + j, xs);
      return;
    }
    DDPM_UNROLL
    for (int i = 0; i < kItems; ++i) {
      if (j + i >= args.numel) break;
      Offsets o;
      if constexpr (kAccess == Access::strided32) o = offsets<uint32_t>(args, static_cast<uint32_t>(j + i));
      if constexpr (kAccess == Access::strided64) o = offsets<uint64_t>(args, static_cast<uint64_t>(j + i));
      if constexpr (kAccess == Access::vector) o = {j + i, j + i, j + i, j + i};
      const float xi = Op::kX ? to_float(x[o.x]) : 0.0f;
      const float mi = Op::kSecond ? to_float(m[o.model_output]) : 0.0f;
      const float zi = kNoise == Noise::given ? to_float(noise[o.noise]) : z[i];
      out[o.out] = from_float<X>(element(xi, mi, zi));
    }
  }
};

template <class Op, Noise kNoise, bool kDeviceSeed, Access kAccess, class X, class M, class Z>
__global__ void __launch_bounds__(kThreads) elementwise(const Args args, const PhiloxKeys host_keys) {
  using Body = Elementwise<Op, kNoise, kDeviceSeed, kAccess, X, M, Z>;
  const int64_t j = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) * Body::kItems;
  if (j >= args.numel) return;
  const int64_t step = static_cast<int64_t>(gridDim.y) * blockDim.y;
  for (int64_t b = static_cast<int64_t>(blockIdx.y) * blockDim.y + threadIdx.y; b < args.batch; b += step) {
    if constexpr (kDeviceSeed) {
      Body::run(args, philox_keys(static_cast<uint64_t>(*args.seed_data)), b, j);
    } else {
      Body::run(args, host_keys, b, j);
    }
  }
}

inline bool aligned(const TensorArg& tensor, int64_t batch) {
  const int64_t size = tensor.dtype == DType::float32 ? 4 : 2;
  return reinterpret_cast<uintptr_t>(tensor.data) % 16 == 0 && (batch == 1 || tensor.batch_stride * size % 16 == 0);
}

inline Access choose_access(const Args& args) {
  if (args.contiguous && aligned(args.x, args.batch) && aligned(args.model_output, args.batch) &&
      aligned(args.noise, args.batch) && aligned(args.out, args.batch))
    return Access::vector;
  return args.numel < (int64_t{1} << 32) ? Access::strided32 : Access::strided64;
}

struct Shape {
  dim3 grid, block;
};

// Blocks of kThreads threads: along a sample, and where samples are small, over several of them.
inline Shape launch_shape(int64_t batch, int64_t numel, int items) {
  const int64_t threads = (numel + items - 1) / items;  // a sample
  unsigned along = 1;
  while (along < kThreads && along < threads) along *= 2;
  const unsigned samples = kThreads / along;
  const int64_t rows = std::min<int64_t>((batch + samples - 1) / samples, 65535);
  return {dim3(static_cast<unsigned>((threads + along - 1) / along), static_cast<unsigned>(rows)),
          dim3(along, samples)};
}

template <class Op, Noise kNoise, bool kDeviceSeed, Access kAccess, class X, class M, class Z>
void launch_access(const Args& args, cudaStream_t stream) {
  using Body = Elementwise<Op, kNoise, kDeviceSeed, kAccess, X, M, Z>;
  const Shape shape = launch_shape(args.batch, args.numel, Body::kItems);
  elementwise<Op, kNoise, kDeviceSeed, kAccess, X, M, Z>
      <<<shape.grid, shape.block, 0, stream>>>(args, philox_keys(args.seed));
}

template <class Op, Noise kNoise, bool kDeviceSeed, class X, class M, class Z>
void launch_typed(const Args& args, cudaStream_t stream) {
  switch (choose_access(args)) {
    case Access::vector:
      return launch_access<Op, kNoise, kDeviceSeed, Access::vector, X, M, Z>(args, stream);
    case Access::strided32:
      return launch_access<Op, kNoise, kDeviceSeed, Access::strided32, X, M, Z>(args, stream);
    case Access::strided64:
      return launch_access<Op, kNoise, kDeviceSeed, Access::strided64, X, M, Z>(args, stream);
  }
}

// X: of x and out; M: of the second tensor; Z: of given noise.
template <class Op, class X, class M, class Z>
void launch_noise(const Args& args, cudaStream_t stream) {
  switch (args.noise_kind) {
    case Noise::none:
      return launch_typed<Op, Noise::none, false, X, M, Z>(args, stream);
    case Noise::given:
      return launch_typed<Op, Noise::given, false, X, M, Z>(args, stream);
    case Noise::drawn:
      if (args.seed_data != nullptr) return launch_typed<Op, Noise::drawn, true, X, M, Z>(args, stream);
      return launch_typed<Op, Noise::drawn, false, X, M, Z>(args, stream);
  }
}

// Calls launch(stream) with the device current, and reports a launch that failed.
template <class Launch>
void on_device(int device, Launch launch) {
  const c10::cuda::CUDAGuard guard(static_cast<c10::DeviceIndex>(device));
  launch(c10::cuda::getCurrentCUDAStream(static_cast<c10::DeviceIndex>(device)).stream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace ddpm_ext::cuda
