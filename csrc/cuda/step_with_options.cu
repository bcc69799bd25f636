// The step with options: calls take_step of core/step_with_options.h for every element. Which tensors a call has is
// known only at run time. So the kernels branch on null pointers, and all threads take the same branch. Frequent sets
// of options have specialised kernels (option_sets.cuh).
#include "core/step_with_options.h"

#include <type_traits>
#include <utility>

#include "cuda/access.cuh"
#include "cuda/launch.cuh"
#include "cuda/memory.cuh"
#include "cuda/normals.cuh"
#include "cuda/operators.h"
#include "cuda/option_sets.cuh"
#include "cuda/pixels.cuh"
#include "cuda/sample.cuh"

namespace ddpm_ext::cuda {
namespace {

// The number of a sample's elements that a thread processes in a turn (loop iteration).
template <Access kAccess, class Options, class X>
constexpr int kStepItems = kAccess == Access::vector && Options::kEight && sizeof(X) == 2 ? 8 : 4;

// Calls store(value) with a value of model_input's C++ type. The type may differ from those of the samples and of the
// model's output.
template <class Store>
__device__ __forceinline__ void by_input_dtype(const StepCall& call, Store store) {
  switch (call[Result::model_input].dtype) {
    case DType::float32:
      return store(float());
    case DType::float16:
      return store(__half());
    case DType::bfloat16:
      return store(__nv_bfloat16());
  }
}

// Loads and stores a thread's elements of samples that are contiguous in every tensor, from element j of sample b on.
// Loads do nothing if `inside` is false, or if `given` is false: the call does not have the tensor.
template <class Index>
class DensePositions {
 public:
  __device__ __forceinline__ DensePositions(Index b, Index j, bool inside = true) : b_(b), j_(j), inside_(inside) {
    make_opaque(b_);  // otherwise the compiler would keep the start of the sample in registers, for each tensor
  }

  // Returns the offset of the thread's first element in a tensor.
  template <class Which>
  __device__ __forceinline__ int64_t offset(const StepCall& call, Which which) const {
    return sample_start(call[which].batch_stride, b_) + j_;
  }
  template <class T, int kItems>
  __device__ __forceinline__ void load(const StepCall& call, Role role, bool given, Vector<T, kItems>& to) const {
    to.load_if(inside_ && given, static_cast<const T*>(call[role].data) + offset(call, role));
  }
  template <class T, int kItems>
  __device__ __forceinline__ void store(const StepCall&, T* p, const TensorArg&, const Vector<T, kItems>& from) const {
    from.store(p);
  }

 private:
  Index b_;
  const Index j_;
  const bool inside_;
};

// Like DensePositions, for samples with any strides: one element, or two that are neighbours along the last dimension.
// The offsets in all inputs are computed at once. The offset in a result is computed when the result is stored, since
// the offsets in all results would not fit in registers.
class StridedPositions {
 public:
  __device__ __forceinline__ StridedPositions(const StepCall& call, const Dividers& dividers, int64_t b, int64_t j,
                                              int count)
      : dividers_(dividers), b_(b), j_(j), count_(count) {
    make_opaque(b_);
    DDPM_UNROLL
    for (int i = 0; i < kRoles; ++i) inputs_[i] = b_ * call.inputs[i].batch_stride;
    for_each_index(call, dividers, j_, [&](int d, int64_t index) {
      DDPM_UNROLL
      for (int i = 0; i < kRoles; ++i) inputs_[i] += index * call.inputs[i].strides[d];
    });
    make_opaque(j_);
  }

  __device__ __forceinline__ int64_t offset(const StepCall& call, Result result) const {
    const TensorArg& tensor = call[result];
    int64_t offset = b_ * tensor.batch_stride;
    for_each_index(call, dividers_, j_, [&](int d, int64_t index) { offset += index * tensor.strides[d]; });
    return offset;
  }
  template <class T>
  __device__ __forceinline__ void load(const StepCall& call, Role role, bool given, Vector<T, 2>& to) const {
    const TensorArg& tensor = call[role];
    const T* const p = static_cast<const T*>(tensor.data) + inputs_[static_cast<int>(role)];
    if (given) to.gather(p, stride(call, tensor));
  }
  template <class T>
  __device__ __forceinline__ void store(const StepCall& call, T* p, const TensorArg& tensor,
                                        const Vector<T, 2>& from) const {
    from.scatter(p, stride(call, tensor), count_);
  }

 private:
  // The stride from the first element to the second. A single element is loaded twice.
  __device__ __forceinline__ int64_t stride(const StepCall& call, const TensorArg& tensor) const {
    return count_ == 2 ? tensor.strides[call.dims - 1] : 0;
  }

  const Dividers& dividers_;
  int64_t b_, j_;
  const int count_;
  int64_t inputs_[kRoles];
};

// The Io of take_step (core/step_with_options.h) for a thread's kItems elements. The constructor issues the loads of
// all tensors, before the first value is used. A call of take_step processes two pairs of elements, or one if kItems is
// 2.
template <class Options, class X, class M, int kItems, class Positions>
class Tensors {
 public:
  __device__ __forceinline__ Tensors(const StepCall& call, const Positions& positions)
      : call_(call), positions_(positions) {
    fetch(std::make_integer_sequence<int, kRoles>());
  }

  template <class Which>
  __device__ __forceinline__ bool has(Which which) const {
    return cuda::has<Options>(call_, which);
  }

  template <Role kRole>
  __device__ __forceinline__ F2 load(int i) const {
    return widen(get<kRole>().pairs[first + i]);
  }
  // Takes the pair `i` of a result. Writes the result to memory when it has all of the thread's elements, or, for a
  // model_input of any dtype, in each call of take_step. All inputs have been loaded by then.
  template <Result kResult>
  __device__ __forceinline__ void store(int i, F2 value) {
    if constexpr (kResult == Result::model_input && Options::kAnyInput) {
      input_[i] = value;
      if (i == kPairs - 1) by_input_dtype(call_, [&](auto type) { store_input<decltype(type)>(); });
    } else {
      Vector<X, kItems>& result = results_[static_cast<int>(kResult)];
      narrow(value, result.pairs[first + i]);
      if (first + i + 1 < kItems / 2) return;
      const TensorArg& to = call_[kResult];
      positions_.store(call_, static_cast<X*>(to.data) + positions_.offset(call_, kResult), to, result);
    }
  }

  int first = 0;  // the first pair of the current take_step: i of load and store is relative to it

 private:
  static constexpr int kPairs = kItems == 2 ? 1 : 2;  // the number of pairs in a call of take_step

  template <Role kRole>
  __device__ __forceinline__ auto& get() const {
    if constexpr (of_model(kRole)) {
      return of_model_[static_cast<int>(kRole) - kLikeX];
    } else {
      return like_x_[static_cast<int>(kRole)];
    }
  }

  // Stores the elements of model_input after each take_step. Unlike other results, they are not collected over several
  // calls, since their dtype is known only at run time.
  template <class T>
  __device__ __forceinline__ void store_input() const {
    Vector<T, 2 * kPairs> values;
    DDPM_UNROLL
    for (int i = 0; i < kPairs; ++i) narrow(input_[i], values.pairs[i]);
    const TensorArg &to = call_[Result::model_input], &again = call_.input_again;
    const int64_t offset = positions_.offset(call_, Result::model_input) + 2 * first;
    positions_.store(call_, static_cast<T*>(to.data) + offset, to, values);
    if (again.data != nullptr) positions_.store(call_, static_cast<T*>(again.data) + offset, again, values);
  }

  template <int... kEach>
  __device__ __forceinline__ void fetch(std::integer_sequence<int, kEach...>) {
    (fetch_one<static_cast<Role>(kEach)>(), ...);
  }
  template <Role kRole>
  __device__ __forceinline__ void fetch_one() {
    if constexpr ((Options::kMay & bit(kRole)) == 0) return;
    using T = std::conditional_t<of_model(kRole), M, X>;
    positions_.load(call_, kRole, has(kRole), const_cast<Vector<T, kItems>&>(get<kRole>()));
  }

  const StepCall& call_;
  const Positions positions_;
  Vector<X, kItems> like_x_[kLikeX];
  Vector<M, kItems> of_model_[kRoles - kLikeX];
  // Both arrays are initialised, since only branches write to them. Otherwise ptxas would reserve their registers
  // during the whole loop.
  Vector<X, kItems> results_[kResults] = {};
  F2 input_[kPairs] = {};
};

// The Io of take_step (core/step_with_options.h) for a single element, after the last whole vector of a contiguous
// sample. take_step processes pairs, so the pair's second element is not used.
template <class Options, class X, class M>
class ElementTensors {
 public:
  __device__ __forceinline__ ElementTensors(const StepCall& call, int64_t b, int64_t j) : call_(call) {
    make_opaque(b);
    DDPM_UNROLL
    for (int i = 0; i < kRoles; ++i) inputs_[i] = b * call.inputs[i].batch_stride + j;
    DDPM_UNROLL
    for (int i = 0; i < kResults; ++i) results_[i] = b * call.results[i].batch_stride + j;
  }

  template <class Which>
  __device__ __forceinline__ bool has(Which which) const {
    return cuda::has<Options>(call_, which);
  }

  template <Role kRole>
  __device__ __forceinline__ F2 load(int) const {
    using T = std::conditional_t<of_model(kRole), M, X>;
    return {to_float(static_cast<const T*>(call_[kRole].data)[inputs_[static_cast<int>(kRole)]]), 0.0f};
  }
  template <Result kResult>
  __device__ __forceinline__ void store(int, F2 value) const {
    const int64_t offset = results_[static_cast<int>(kResult)];
    if constexpr (kResult == Result::model_input && Options::kAnyInput) {
      by_input_dtype(call_, [&](auto type) {
        using T = decltype(type);
        static_cast<T*>(call_[kResult].data)[offset] = from_float<T>(value.v.x);
        if (call_.input_again.data != nullptr)
          static_cast<T*>(call_.input_again.data)[offset] = from_float<T>(value.v.x);
      });
    } else {
      static_cast<X*>(call_[kResult].data)[offset] = from_float<X>(value.v.x);
    }
  }

 private:
  const StepCall& call_;
  int64_t inputs_[kRoles], results_[kResults];
};

// From one turn (loop iteration) to the next, a thread goes on by `apart` elements. With Access::strided, a thread
// whose first element has the index `pixels` or more does nothing. `pixels` is the number of elements of the sample or,
// if channels_in_turn (access.cuh) is more than 1, of its first channel. In the second case `apart` equals `pixels`: a
// thread processes the same pixels of every channel. If channels_last > 0, PixelWords lays out the turns, and both
// parameters are unused.
template <Access kAccess, class Options, class X, class M>
__global__ void __launch_bounds__(kThreads, Options::kBlocks)
    with_options(const __grid_constant__ StepCall call, const __grid_constant__ Dividers dividers, const int64_t pixels,
                 const int64_t apart) {
  using Index = IndexOf<kAccess>;
  constexpr int kItems = kStepItems<kAccess, Options, X>;
  using Vectors = Tensors<Options, X, M, kItems, DensePositions<Index>>;
  const Index b = static_cast<Index>(blockIdx.z * gridDim.y + blockIdx.y) * blockDim.y + threadIdx.y;
  if (b >= static_cast<Index>(call.batch)) return;

  const StepRow row = read_row<StepRow>(call, sample_row(call, b));
  // With options that exclude model_variance, the standard deviation comes from the row.
  const bool learned = (Options::kMay & bit(Role::model_variance)) != 0;
  StepSample sample = {call.clip_min, call.clip_max, {}, learned ? call.variance : Variance::of_row};
  DDPM_UNROLL
  for (int i = 0; i < kFactors; ++i) {
    const bool may = (Options::kMay & bit(static_cast<Factor>(i))) != 0;
    sample.factors[i] = may ? of_sample(call.factors[i], b) : 1.0f;
  }
  const uint64_t seed = call.seed_data != nullptr ? static_cast<uint64_t>(*call.seed_data) : call.seed;
  const PhiloxKeys keys = philox_keys(seed);
  const PhiloxSample counter = sample_noise(call, keys, b, row.draw);
  // This line comes after the loads of the seed and of the sample id. It waits for the row, and the compiler would not
  // move those loads before the wait.
  const bool drawn = call.noise_kind == Noise::drawn && draws_noise(row, has<Options>(call, Role::mask));
  // Processes at most four elements, from j to `end` - 1, one by one. z is the noise of four elements from j on.
  const auto by_element = [&](Index j, Index end, const F2* z) {
#pragma unroll 1
    for (Index i = j; i < end; ++i) {
      const F2 half = i & 2 ? z[1] : z[0];
      F2 one[1] = {F2(i & 1 ? half.v.y : half.v.x)};
      ElementTensors<Options, X, M> tensors(call, b, i);
      take_step(row, sample, tensors, drawn, one);
    }
  };

  const Index numel = static_cast<Index>(call.numel);
  const Index step = static_cast<Index>(apart);
  Index j = (static_cast<Index>(blockIdx.x) * blockDim.x + threadIdx.x) * kItems;
  if constexpr (kAccess == Access::vector) {
    const Index whole = numel / kItems * kItems;
#pragma unroll 1
    for (; j < whole; j += step) {
      Vectors tensors(call, {b, j});
      DDPM_UNROLL
      for (int q = 0; q < kItems; q += 4) {
        F2 z[2] = {F2(0.0f), F2(0.0f)};
        if (drawn) {
          draw_normals(keys, counter, j + q, z);
          keep_uses_behind(z[1].v.y);
        }
        tensors.first = q / 2;
        take_step(row, sample, tensors, drawn, z);
      }
    }
    // One thread processes the elements after the sample's last whole vector.
    for (; j < numel; j += 4) {
      F2 z[2] = {F2(0.0f), F2(0.0f)};
      if (drawn) draw_normals(keys, counter, j, z);
      by_element(j, numel - j < 4 ? numel : j + 4, z);
    }
  } else {
    // Computes the Philox keys in every turn. There are too few registers to keep `keys`. make_opaque hides from the
    // compiler that the keys are the same in every turn.
    const auto keys_of_turn = [&] {
      int64_t opaque_seed = static_cast<int64_t>(seed);
      make_opaque(opaque_seed);
      return philox_keys(static_cast<uint64_t>(opaque_seed));
    };
    if (call.channels_last > 0) {
      const PixelWords words(call, dividers);
#pragma unroll 1
      for (uint32_t quad = words.first; quad < words.end; quad += words.step) {
        const bool has = words.has(quad);
        const DensePositions<uint32_t> positions(static_cast<uint32_t>(b), words.element(quad), has);
        Tensors<Options, X, M, 4, DensePositions<uint32_t>> tensors(call, positions);
        F2 z[2] = {F2(0.0f), F2(0.0f)};
        if (drawn) words.draw_normals(keys_of_turn(), counter, quad, z);
        if (has) take_step(row, sample, tensors, drawn, z);
      }
      return;
    }
    if (j >= pixels) return;
#pragma unroll 1
    for (; j < numel; j += apart) {
      F2 z[2] = {F2(0.0f), F2(0.0f)};
      if (drawn) draw_normals(keys_of_turn(), counter, j, z);
      const int left = numel - j < 4 ? static_cast<int>(numel - j) : 4;
#pragma unroll 1
      for (int i = 0; i < left;) {
        const int count = i % 2 == 0 && in_row(call, dividers, j + i, 2) ? 2 : 1;
        const F2 half = i & 2 ? z[1] : z[0];
        F2 noise[1] = {F2(i & 1 ? half.v.y : half.v.x, half.v.y)};
        Tensors<Options, X, M, 2, StridedPositions> tensors(call, {call, dividers, b, j + i, count});
        take_step(row, sample, tensors, drawn, noise);
        i += count;
      }
    }
  }
}

template <Access kAccess, class Options, class X, class M>
void launch(const StepCall& call, cudaStream_t stream) {
  constexpr auto kKernel = with_options<kAccess, Options, X, M>;
  const int64_t pixels = elements_of_threads(call);
  // If a thread processes several channels, its turns are the channels. at_once is then so large that launch_shape adds
  // no further turns.
  const Room room = room_for<kKernel>(kThreads);
  const int64_t at_once = pixels < call.numel ? call.batch * call.numel : room.blocks;
  constexpr int kItems = kStepItems<kAccess, Options, X>;
  const Shape shape = launch_shape(call.batch, pixels, kItems, room.multiprocessors, at_once);
  const int64_t step = int64_t{kItems} * shape.grid.x * shape.block.x;
  launch_on<kKernel>(shape, stream, call, Dividers(call), pixels, pixels < call.numel ? pixels : step);
}

// Launches the kernel of a frequent set of options if it accepts the call. Returns whether it does.
template <class Options, class X, class M>
bool launch_if_fits(const StepCall& call, cudaStream_t stream) {
  if (!fits<Options>(call)) return false;
  launch<Access::vector, Options, X, M>(call, stream);
  return true;
}

// Launches the kernel of the first of these sets of options that accepts the call, or else the kernel for any options.
// A call with Access::strided always takes the kernel for any options.
template <class... OptionSets>
void launch_first(const StepCall& call, cudaStream_t stream) {
  by_dtypes(call[Role::x_t].dtype, call[Role::model_output].dtype, [&](auto x, auto m) {
    using X = decltype(x);
    using M = decltype(m);
    if (choose_access(call) == Access::strided)
      return launch<Access::strided, AnyOptions, X, M>(by_pixels(call), stream);
    if (!(launch_if_fits<OptionSets, X, M>(call, stream) || ...))
      launch<Access::vector, AnyOptions, X, M>(call, stream);
  });
}

}  // namespace

void step_with_options(const StepCall& call, int device) {
  on_device(device, [&](cudaStream_t stream) {
    launch_first<Guided, WithX0, GuidedWithX0, WithHistory, NextInput, LearnedVariance>(call, stream);
  });
}

}  // namespace ddpm_ext::cuda
