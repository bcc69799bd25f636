#include "core/extended.h"
#include "cuda/elementwise.cuh"
#include "cuda/launch.h"

namespace ddpm_ext::cuda {
namespace {

// A step's tensors, 128 or 64 bits at a time: kItems elements of a sample, of which extended_step takes four. All loads
// are under way before the first is waited for.
template <class X, class M>
class VectorTensors {
 public:
  static constexpr int kItems = sizeof(X) == 2 ? 8 : 4;

  __device__ __forceinline__ VectorTensors(const ExtendedArgs& args, uint32_t b, uint32_t j)
      : args_(args), b_(b), j_(j) {
    fetch<Role::x, Role::noise, Role::x_start, Role::history, Role::gradient, Role::known, Role::mask,
          Role::model_output, Role::uncond, Role::variance>();
  }

  __device__ __forceinline__ bool has(Role role) const { return args_[role].data != nullptr; }
  __device__ __forceinline__ bool has(Result result) const { return args_[result].data != nullptr; }

  template <Role kRole>
  __device__ __forceinline__ F2 load(int i) const {
    return widen(get<kRole>().pairs[first + i]);
  }
  template <Result kResult>
  __device__ __forceinline__ void store(int i, F2 value) {
    narrow(value, results_[static_cast<int>(kResult)].pairs[first + i]);
  }

  __device__ __forceinline__ void finish() const { put<Result::prev, Result::copy, Result::x0>(); }

  int first = 0;  // pair of the four

 private:
  template <Role kRole>
  __device__ __forceinline__ auto& get() const {
    if constexpr (of_model(kRole)) {
      return of_model_[static_cast<int>(kRole) - static_cast<int>(Role::model_output)];
    } else {
      return like_x_[static_cast<int>(kRole)];
    }
  }

  __device__ __forceinline__ int64_t offset(const TensorArg& tensor) const {
    return sample_start(tensor.batch_stride, b_) + j_;
  }

  template <Role... kEach>
  __device__ __forceinline__ void fetch() {
    (fetch_one<kEach>(), ...);
  }
  template <Role kRole>
  __device__ __forceinline__ void fetch_one() {
    using T = std::conditional_t<of_model(kRole), M, X>;
    if (!has(kRole)) return;
    const TensorArg& tensor = args_[kRole];
    const_cast<Vector<T, kItems>&>(get<kRole>()).load(static_cast<const T*>(tensor.data) + offset(tensor));
  }
  template <Result... kEach>
  __device__ __forceinline__ void put() const {
    (put_one<kEach>(), ...);
  }
  template <Result kResult>
  __device__ __forceinline__ void put_one() const {
    if (!has(kResult)) return;
    const TensorArg& tensor = args_[kResult];
    results_[static_cast<int>(kResult)].store(static_cast<X*>(tensor.data) + offset(tensor));
  }

  const ExtendedArgs& args_;
  const uint32_t b_, j_;
  Vector<X, kItems> like_x_[static_cast<int>(Role::model_output)];
  Vector<M, kItems> of_model_[kRoles - static_cast<int>(Role::model_output)];
  Vector<X, kItems> results_[kResults];
};

// The same for one element, the first of a pair whose other nobody asks for: by any strides, and beyond a sample's
// whole vectors.
template <class X, class M, bool kContiguous>
class ElementTensors {
 public:
  __device__ __forceinline__ ElementTensors(const ExtendedArgs& args, const Dividers& dividers, int64_t b, int64_t j)
      : args_(args) {
    each([&](const TensorArg& tensor, int64_t& offset) { offset = b * tensor.batch_stride + (kContiguous ? j : 0); });
    if constexpr (!kContiguous) {
      for_each_index(args, dividers, j, [&](int d, int64_t index) {
        each([&](const TensorArg& tensor, int64_t& offset) { offset += index * tensor.strides[d]; });
      });
    }
  }

  __device__ __forceinline__ bool has(Role role) const { return args_[role].data != nullptr; }
  __device__ __forceinline__ bool has(Result result) const { return args_[result].data != nullptr; }

  template <Role kRole>
  __device__ __forceinline__ F2 load(int) const {
    using T = std::conditional_t<of_model(kRole), M, X>;
    return {to_float(static_cast<const T*>(args_[kRole].data)[inputs_[static_cast<int>(kRole)]]), 0.0f};
  }
  template <Result kResult>
  __device__ __forceinline__ void store(int, F2 value) const {
    static_cast<X*>(args_[kResult].data)[results_[static_cast<int>(kResult)]] = from_float<X>(value.v.x);
  }

 private:
  template <class Visit>
  __device__ __forceinline__ void each(Visit visit) {
    DDPM_UNROLL
    for (int i = 0; i < kRoles; ++i) visit(args_.inputs[i], inputs_[i]);
    DDPM_UNROLL
    for (int i = 0; i < kResults; ++i) visit(args_.results[i], results_[i]);
  }

  const ExtendedArgs& args_;
  int64_t inputs_[kRoles], results_[kResults];
};

template <class Index>
__device__ __forceinline__ float of_sample(const PerSample& values, Index b) {
  return values.data == nullptr ? 1.0f : values.data[sample_start(values.stride, b)];
}

template <Access kAccess, class X, class M>
__global__ void __launch_bounds__(kThreads)
    extended(const __grid_constant__ ExtendedArgs args, const __grid_constant__ Dividers dividers) {
  constexpr bool kVector = kAccess == Access::vector;
  using Index = std::conditional_t<kVector, uint32_t, int64_t>;
  constexpr int kItems = kVector ? VectorTensors<X, M>::kItems : 4;
  const Index b = static_cast<Index>(blockIdx.z * gridDim.y + blockIdx.y) * blockDim.y + threadIdx.y;
  if (b >= static_cast<Index>(args.batch)) return;

  const ExtendedRow row = static_cast<const ExtendedRow*>(args.table)[sample_row(args, b)];
  const ExtendedSample sample = {args.clip_min, args.clip_max, of_sample(args.output_scale, b),
                                 of_sample(args.x_start_scale, b), args.variance_kind};
  const bool drawn = args.noise_kind == Noise::drawn && draws(row, args[Role::mask].data != nullptr);
  const uint64_t seed = args.seed_data != nullptr ? static_cast<uint64_t>(*args.seed_data) : args.seed;
  const PhiloxKeys keys = philox_keys(seed);
  const PhiloxSample counter = sample_noise(args, keys, b, row.step.draw);

  const Index numel = static_cast<Index>(args.numel);
  const Index step = static_cast<Index>(gridDim.x) * blockDim.x * kItems;
  Index j = (static_cast<Index>(blockIdx.x) * blockDim.x + threadIdx.x) * kItems;
  if constexpr (kVector) {
    const Index whole = numel / kItems * kItems;
#pragma unroll 1
    for (; j < whole; j += step) {
      VectorTensors<X, M> tensors(args, b, j);
      DDPM_UNROLL
      for (int q = 0; q < kItems; q += 4) {
        F2 z[2] = {F2(0.0f), F2(0.0f)};
        if (drawn) draw_normals(keys, counter, j + q, z);
        tensors.first = q / 2;
        extended_step(row, sample, tensors, drawn, z);
      }
      tensors.finish();
    }
  }
  // Fours, or those of the ragged end, to which one thread comes.
  for (; j < numel; j += kVector ? 4 : step) {
    F2 z[2] = {F2(0.0f), F2(0.0f)};
    if (drawn) draw_normals(keys, counter, j, z);
    const Index end = numel - j < 4 ? numel : j + 4;
#pragma unroll 1
    for (Index i = j; i < end; ++i) {
      const F2 half = i & 2 ? z[1] : z[0];
      F2 one[1] = {F2(i & 1 ? half.v.y : half.v.x)};
      ElementTensors<X, M, kVector> tensors(args, dividers, b, i);
      extended_step(row, sample, tensors, drawn, one);
    }
  }
}

template <Access kAccess, class X, class M>
void launch_access(const ExtendedArgs& args, cudaStream_t stream) {
  const Shape shape = launch_shape(args.batch, args.numel, kAccess == Access::vector ? VectorTensors<X, M>::kItems : 4);
  cudaLaunchConfig_t config = {};
  config.gridDim = shape.grid;
  config.blockDim = shape.block;
  config.stream = stream;
  C10_CUDA_CHECK(cudaLaunchKernelEx(&config, extended<kAccess, X, M>, args, Dividers(args)));
}

template <class X, class M>
void launch(const ExtendedArgs& args, cudaStream_t stream) {
  switch (choose_access(args)) {
    case Access::vector:
      return launch_access<Access::vector, X, M>(args, stream);
    case Access::strided:
      return launch_access<Access::strided, X, M>(args, stream);
  }
}

}  // namespace

void extended_step(const ExtendedArgs& args, int device) {
  on_device(device, [&](cudaStream_t stream) {
    by_dtypes(args[Role::x].dtype, args[Role::model_output].dtype,
              [&](auto x, auto m) { launch<decltype(x), decltype(m)>(args, stream); });
  });
}

}  // namespace ddpm_ext::cuda
