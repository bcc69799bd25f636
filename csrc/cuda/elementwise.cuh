// One kernel template for every operator: a thread takes kItems consecutive elements of a sample, so whole blocks of
// Philox, whatever the launch's shape. Grid and block are (elements, samples).
#pragma once

#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <algorithm>
#include <initializer_list>
#include <type_traits>

#include "core/normal.h"
#include "core/philox.h"
#include "cuda/memory.cuh"

namespace ddpm_ext::cuda {

constexpr int kThreads = 256;

// How a kernel reaches memory: 128 bits at a time, with 32 bits for everything inside a sample; or element by element,
// with 64.
enum class Access { vector, strided };

// Where sample b begins.
template <class Index>
__device__ __forceinline__ int64_t sample_start(int64_t batch_stride, Index b) {
  if constexpr (sizeof(Index) == 4) return static_cast<uint64_t>(b) * static_cast<uint32_t>(batch_stride);
  return b * batch_stride;
}

template <class Index>
__device__ __forceinline__ int64_t sample_row(const Call& args, Index b) {
  int64_t t = args.t_index;
  if (args.t != nullptr) t = args.t[sample_start(args.t_stride, b)];
  return t < 0 ? 0 : t >= args.rows ? args.rows - 1 : t;  // a t on the GPU was not read back to be checked
}

// row_draw: where the caller gave none.
template <class Index>
__device__ __forceinline__ PhiloxSample sample_noise(const Call& args, const PhiloxKeys& keys, Index b,
                                                     uint32_t row_draw) {
  uint64_t id = static_cast<uint64_t>(args.first_id) + b;
  if (args.sample_ids != nullptr) id = args.sample_ids[sample_start(args.ids_stride, b)];
  const uint32_t draw = args.draw >= 0 ? static_cast<uint32_t>(args.draw) : row_draw;
  return philox_sample(keys, sample_counter(id, args.stream, draw));
}

// The normals of the four elements that j is among.
template <class Index>
__device__ __forceinline__ void draw_normals(const PhiloxKeys& keys, const PhiloxSample& sample, Index j, F2 (&z)[2]) {
  uint32_t w[4];
  F2 even, odd;
  philox_block(keys, sample, static_cast<uint32_t>(j >> 2), w);
  box_muller(U2(w[0], w[2]), U2(w[1], w[3]), even, odd);
  z[0] = F2(even.v.x, odd.v.x);
  z[1] = F2(even.v.y, odd.v.y);
}

// What a thread does for one sample. Op: kX and kSecond say whether it reads x and a second tensor besides the noise,
// Row is its table's row, element<kNoise>(row, args, x, second, z) its arithmetic, draws(row) whether a row needs drawn
// noise at all, and draw(row, t) is the draw where the caller gave none.
template <class Op, Noise kNoise, bool kDeviceSeed, Access kAccess, class X, class M, class Z>
class Elementwise {
 public:
  using Index = std::conditional_t<kAccess == Access::vector, uint32_t, int64_t>;
  static constexpr bool kNarrow =
      sizeof(X) == 2 || (Op::kSecond && sizeof(M) == 2) || (kNoise == Noise::given && sizeof(Z) == 2);
  // Each load of the narrowest type is 128 bits; and two blocks of Philox make up for what every turn of the loop
  // costs.
  static constexpr int kItems = kAccess == Access::vector && (kNarrow || kNoise == Noise::drawn) ? 8 : 4;

  // All that the sample's elements share.
  __device__ __forceinline__ Elementwise(const Args& args, const Dividers& dividers, const PhiloxKeys& keys, Index b)
      : args_(args),
        dividers_(dividers),
        keys_(keys),
        x_(static_cast<const X*>(args.x.data) + sample_start(args.x.batch_stride, b)),
        m_(static_cast<const M*>(args.model_output.data) + sample_start(args.model_output.batch_stride, b)),
        noise_(static_cast<const Z*>(args.noise.data) + sample_start(args.noise.batch_stride, b)),
        out_(static_cast<X*>(args.out.data) + sample_start(args.out.batch_stride, b)) {
    const int64_t t = sample_row(args, b);
    if constexpr (!Op::kRowless) row_ = static_cast<const Row*>(args.table)[t];
    if constexpr (kNoise == Noise::drawn) counter_ = sample_noise(args, keys, b, Op::draw(row_, t));
  }

  // Elements first to first + kItems, and on in steps.
  __device__ __forceinline__ void run(Index first, Index step) const {
    // As on the CPU, a row without noise has none added: not even zero, which would turn -0 into 0.
    if (kNoise == Noise::drawn && !Op::draws(row_)) {
      loop<Noise::none>(first, step);
    } else {
      loop<kNoise>(first, step);
    }
  }

 private:
  using Row = typename Op::Row;

  // kHere: kNoise, or none for a row that needs none.
  template <Noise kHere>
  __device__ __forceinline__ void loop(Index j, Index step) const {
    const Index numel = static_cast<Index>(args_.numel);
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
      for (; j < numel; ++j) {  // the ragged end: one thread comes here
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
        const Offsets first = offsets(args_, dividers_, j, left);
        DDPM_UNROLL
        for (int i = 0; i < kItems; ++i) {
          if (j + i >= numel) break;
          Offsets o = first;
          if (int64_t unused; i < left)
            o.add(args_, args_.dims - 1, i);
          else
            o = offsets(args_, dividers_, j + i, unused);
          element<kHere>(o, i % 2 == 0 ? z[i / 2].v.x : z[i / 2].v.y);
        }
      }
    }
  }

  // Elements j to j + kItems. Loads come before the noise, which is drawn while they are under way.
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
        narrow(Op::template element<kHere>(row_, args_, xi, mi, z[p]), outs.pairs[i]);
      }
    }
    outs.store(out + j);
  }

  template <Noise kHere>
  __device__ __forceinline__ void element(const Offsets& o, float z) const {
    const float x = Op::kX ? to_float(x_[o.x]) : 0.0f;
    const float m = Op::kSecond ? to_float(m_[o.model_output]) : 0.0f;
    if constexpr (kHere == Noise::given) z = to_float(noise_[o.noise]);
    out_[o.out] = from_float<X>(Op::template element<kHere>(row_, args_, x, m, z));
  }

  const Args& args_;
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
    elementwise(const __grid_constant__ Args args, const __grid_constant__ Dividers dividers,
                const __grid_constant__ PhiloxKeys host_keys) {
  using Body = Elementwise<Op, kNoise, kDeviceSeed, kAccess, X, M, Z>;
  using Index = typename Body::Index;
  const Index b = static_cast<Index>(blockIdx.z * gridDim.y + blockIdx.y) * blockDim.y + threadIdx.y;
  if (b >= static_cast<Index>(args.batch)) return;
  PhiloxKeys keys;
  if constexpr (kDeviceSeed) keys = philox_keys(static_cast<uint64_t>(*args.seed_data));
  const Body body(args, dividers, kDeviceSeed ? keys : host_keys, b);
  const Index first = static_cast<Index>(blockIdx.x) * blockDim.x + threadIdx.x;
  body.run(first * Body::kItems, static_cast<Index>(gridDim.x) * blockDim.x * Body::kItems);
}

// Whether a tensor is where a kernel with Access::vector can reach it.
inline bool in_vectors(const TensorArg& tensor, int64_t batch) {
  const int64_t size = tensor.dtype == DType::float32 ? 4 : 2;
  return reinterpret_cast<uintptr_t>(tensor.data) % 16 == 0 && (batch == 1 || tensor.batch_stride * size % 16 == 0) &&
         tensor.batch_stride < int64_t{1} << 32;
}

// Whether a call is of a size for it.
inline bool in_vectors(const Call& args) {
  constexpr int64_t k31 = int64_t{1} << 31, k32 = int64_t{1} << 32;
  // With fewer than 2^31 elements a sample, an element's number and a step of the loop add up to less than 2^32.
  return args.contiguous && args.numel < k31 && args.batch < k31 && args.t_stride < k32 && args.ids_stride < k32;
}

inline Access choose_access(const Call& args, std::initializer_list<const TensorArg*> tensors) {
  bool vector = in_vectors(args);
  for (const TensorArg* tensor : tensors) vector = vector && in_vectors(*tensor, args.batch);
  return vector ? Access::vector : Access::strided;
}

inline Access choose_access(const Args& args) {
  return choose_access(args, {&args.x, &args.model_output, &args.noise, &args.out});
}

inline Access choose_access(const ExtendedArgs& args) {
  bool vector =
      in_vectors(args) && args.output_scale.stride < int64_t{1} << 32 && args.x_start_scale.stride < int64_t{1} << 32;
  for (const TensorArg& tensor : args.inputs) vector = vector && in_vectors(tensor, args.batch);
  for (const TensorArg& tensor : args.results) vector = vector && in_vectors(tensor, args.batch);
  return vector ? Access::vector : Access::strided;
}

struct Shape {
  dim3 grid, block;
};

// Blocks of kThreads threads: along a sample, and where samples are small, over several of them. Threads of a large
// tensor take several turns, which share what comes before the first.
inline Shape launch_shape(int64_t batch, int64_t numel, int items) {
  constexpr int64_t kEnoughBlocks = 2048;  // twice what the largest GPU holds at once
  constexpr int64_t kMaxTurns = 8, kMaxGridY = 65535;
  const auto divide_up = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
  const int64_t threads = divide_up(numel, items);  // a sample
  int64_t along = 1;
  while (along < kThreads && along < threads) along *= 2;
  const int64_t samples = kThreads / along, rows = divide_up(batch, samples), columns = divide_up(threads, along);
  const int64_t turns = std::clamp<int64_t>(columns * rows / kEnoughBlocks, 1, kMaxTurns);
  const auto unsigned_int = [](int64_t n) { return static_cast<unsigned>(n); };
  return {dim3(unsigned_int(divide_up(columns, turns)), unsigned_int(std::min(rows, kMaxGridY)),
               unsigned_int(divide_up(rows, kMaxGridY))),
          dim3(unsigned_int(along), unsigned_int(samples))};
}

template <class Op, Noise kNoise, bool kDeviceSeed, Access kAccess, class X, class M, class Z>
void launch_access(const Args& args, cudaStream_t stream) {
  using Body = Elementwise<Op, kNoise, kDeviceSeed, kAccess, X, M, Z>;
  const Shape shape = launch_shape(args.batch, args.numel, Body::kItems);
  cudaLaunchConfig_t config = {};
  config.gridDim = shape.grid;
  config.blockDim = shape.block;
  config.stream = stream;
  C10_CUDA_CHECK(cudaLaunchKernelEx(&config, elementwise<Op, kNoise, kDeviceSeed, kAccess, X, M, Z>, args,
                                    Dividers(args), philox_keys(args.seed)));
}

template <class Op, Noise kNoise, bool kDeviceSeed, class X, class M, class Z>
void launch_typed(const Args& args, cudaStream_t stream) {
  switch (choose_access(args)) {
    case Access::vector:
      return launch_access<Op, kNoise, kDeviceSeed, Access::vector, X, M, Z>(args, stream);
    case Access::strided:
      return launch_access<Op, kNoise, kDeviceSeed, Access::strided, X, M, Z>(args, stream);
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

// Calls launch(x, m) with a value of each type: samples', and a model output's, which may be lower beside float32.
template <class Launch>
void by_dtypes(DType x, DType m, Launch launch) {
  switch (x) {
    case DType::float16:
      return launch(__half(), __half());
    case DType::bfloat16:
      return launch(__nv_bfloat16(), __nv_bfloat16());
    case DType::float32:
      switch (m) {
        case DType::float32:
          return launch(float(), float());
        case DType::float16:
          return launch(float(), __half());
        case DType::bfloat16:
          return launch(float(), __nv_bfloat16());
      }
  }
}

// Calls launch(stream) with the device current.
template <class Launch>
void on_device(int device, Launch launch) {
  const c10::cuda::CUDAGuard guard(static_cast<c10::DeviceIndex>(device));
  launch(c10::cuda::getCurrentCUDAStream(static_cast<c10::DeviceIndex>(device)).stream());
}

}  // namespace ddpm_ext::cuda
