// The training loss: core/loss.h for every element, the slopes and the sums, in one launch.
#include "core/loss.h"

#include <algorithm>
#include <type_traits>

#include "cuda/access.cuh"
#include "cuda/launch.cuh"
#include "cuda/memory.cuh"
#include "cuda/normals.cuh"
#include "cuda/operators.h"
#include "cuda/sample.cuh"

namespace ddpm_ext::cuda {
namespace {

constexpr int kLossThreads = kLossChunk / 4;  // of a block, which takes one chunk of a sample after another
static_assert(kLossThreads == kLossStrands && kLossLanes == 2 * 32);

// The offsets of an element in each of its tensors.
struct Place {
  int64_t model_output, variance, x_start, noise, slope, variance_slope;
};

// Four neighbouring elements. At a sample's end there may be fewer.
template <Access kAccess>
class Four {
 public:
  __device__ __forceinline__ Four(const LossCall& call, const Dividers& dividers, int64_t b, int64_t j)
      : count_(call.numel - j < 4 ? static_cast<int>(call.numel - j) : 4) {
    DDPM_UNROLL
    for (int i = 0; i < 4; ++i) {
      Place& p = places_[i];
      p = {};
      const auto add = [&](int64_t n, auto stride) {
        p.model_output += n * stride(call.model_output);
        p.variance += n * stride(call.variance);
        p.x_start += n * stride(call.x_start);
        p.noise += n * stride(call.noise);
        p.slope += n * stride(call.slope);
        p.variance_slope += n * stride(call.variance_slope);
      };
      add(b, [](const TensorArg& tensor) { return tensor.batch_stride; });
      if constexpr (kAccess == Access::vector) {
        add(j + i, [](const TensorArg&) { return 1; });
      } else if (i < count_) {
        for_each_index(call, dividers, j + i,
                       [&](int d, int64_t n) { add(n, [d](const TensorArg& tensor) { return tensor.strides[d]; }); });
      }
    }
  }

  __device__ __forceinline__ bool has(int i) const { return i < count_; }

  // Reads the elements as two pairs, with zeros beyond the sample's end.
  template <class T>
  __device__ __forceinline__ void load(const TensorArg& tensor, int64_t Place::* place, F2 (&to)[2]) const {
    const T* data = static_cast<const T*>(tensor.data);
    if (kAccess == Access::vector && count_ == 4) {
      Vector<T, 4> vector;
      vector.load(data + places_[0].*place);
      to[0] = widen(vector.pairs[0]);
      to[1] = widen(vector.pairs[1]);
      return;
    }
    float values[4] = {};
    DDPM_UNROLL
    for (int i = 0; i < 4; ++i)
      if (has(i)) values[i] = to_float(data[places_[i].*place]);
    to[0] = F2(values[0], values[1]);
    to[1] = F2(values[2], values[3]);
  }

  template <class T>
  __device__ __forceinline__ void store(const TensorArg& tensor, int64_t Place::* place, const F2 (&from)[2]) const {
    T* data = static_cast<T*>(tensor.data);
    if (kAccess == Access::vector && count_ == 4) {
      Vector<T, 4> vector;
      narrow(from[0], vector.pairs[0]);
      narrow(from[1], vector.pairs[1]);
      vector.store(in_register(data + places_[0].*place));
      return;
    }
    const float values[4] = {from[0].v.x, from[0].v.y, from[1].v.x, from[1].v.y};
    DDPM_UNROLL
    for (int i = 0; i < 4; ++i)
      if (has(i)) data[places_[i].*place] = from_float<T>(values[i]);
  }

 private:
  const int count_;
  Place places_[4];
};

// Adds up a chunk's losses by the first warp. Its first lane has the sum.
__device__ __forceinline__ double sum_of_lanes(const float* losses) {
  float lanes[2] = {0.0f, 0.0f};
  DDPM_UNROLL
  for (int i = 0; i < kLossChunk; i += kLossLanes) {
    lanes[0] += losses[i + threadIdx.x];
    lanes[1] += losses[i + 32 + threadIdx.x];
  }
  double sum = static_cast<double>(lanes[0]) + static_cast<double>(lanes[1]);
  DDPM_UNROLL
  for (int h = 16; h > 0; h /= 2) sum += __shfl_down_sync(0xffffffffu, sum, h);
  return sum;
}

// Adds up values by all threads of a block. The first thread has the sum.
template <class T>
__device__ __forceinline__ double sum_by_strands(const volatile T* values, int64_t count, double* strands) {
  double strand = 0;
  for (int64_t i = threadIdx.x; i < count; i += kLossStrands) strand += values[i];
  __syncthreads();
  strands[threadIdx.x] = strand;
  for (int h = kLossStrands / 2; h > 0; h /= 2) {
    __syncthreads();
    if (threadIdx.x < h) strands[threadIdx.x] += strands[threadIdx.x + h];
  }
  return threadIdx.x == 0 ? strands[0] : 0.0;
}

// Whether this block is the last of `of` blocks to come here. If so, it sees everything that the others wrote.
__device__ __forceinline__ bool comes_last(uint32_t* done, uint32_t of, bool& last) {
  if (threadIdx.x == 0) {
    __threadfence();
    last = atomicAdd(done, 1u) == of - 1;
    __threadfence();
  }
  __syncthreads();
  return last;
}

// The decoder's term, one element after the other.
__device__ __forceinline__ LossParts<F2> decoder_bound(const VariationalRow& row, F2 d, F2 v, F2 x_start) {
  const LossParts<float> a = ddpm_ext::decoder_bound(row, d.v.x, v.v.x, x_start.v.x);
  const LossParts<float> b = ddpm_ext::decoder_bound(row, d.v.y, v.v.y, x_start.v.y);
  return {F2(a.value, b.value), F2(a.slope, b.slope), F2(a.variance_slope, b.variance_slope)};
}

template <class Row, Noise kNoise, Access kAccess, class X, class M>
__global__ void __launch_bounds__(kLossThreads)
    loss_of_samples(const __grid_constant__ LossCall call, const __grid_constant__ Dividers dividers) {
  __shared__ float losses[kLossChunk];
  __shared__ double strands[kLossStrands];
  __shared__ bool last;
  const int64_t b = static_cast<int64_t>(blockIdx.z) * gridDim.y + blockIdx.y;
  if (b >= call.batch) return;
  const int64_t t = sample_row(call, b), chunks = loss_chunks(call.numel);
  constexpr bool kVariational = std::is_same_v<Row, VariationalRow>;
  const Row row = static_cast<const Row*>(call.table)[t];
  const uint64_t seed = call.seed_data != nullptr ? static_cast<uint64_t>(*call.seed_data) : call.seed;
  const PhiloxKeys keys = philox_keys(seed);
  PhiloxSample counter{};
  if constexpr (kNoise == Noise::drawn) counter = sample_noise(call, keys, b, static_cast<uint32_t>(t));
  const F2 factor(slope_factor(call.slope_share, call.kind, row));
  bool has_x_start = call.x_start.data != nullptr, aimed_at_x_start = has_x_start;
  if constexpr (kVariational) has_x_start = reads_x_start(row), aimed_at_x_start = row.k0 != 0.0f;

  for (int64_t chunk = blockIdx.x; chunk < chunks; chunk += gridDim.x) {
    const int64_t j = chunk * kLossChunk + 4 * static_cast<int64_t>(threadIdx.x);
    F2 m[2], v[2] = {F2(0.0f), F2(0.0f)}, x_start[2] = {F2(0.0f), F2(0.0f)}, z[2] = {F2(0.0f), F2(0.0f)};
    F2 slopes[2], variance_slopes[2], values[2] = {F2(0.0f), F2(0.0f)};
    if (j < call.numel) {
      const Four<kAccess> four(call, dividers, b, j);
      four.template load<M>(call.model_output, &Place::model_output, m);
      if (has_x_start) four.template load<X>(call.x_start, &Place::x_start, x_start);
      if constexpr (kNoise == Noise::given) four.template load<X>(call.noise, &Place::noise, z);
      if (kNoise == Noise::drawn && row.k1 != 0.0f) draw_normals(keys, counter, j, z);
      if constexpr (kVariational) {
        if (call.variance.data != nullptr) four.template load<M>(call.variance, &Place::variance, v);
      }
      DDPM_UNROLL
      for (int i = 0; i < 2; ++i) {
        const F2 d = loss_difference(row, m[i], aimed_at_x_start, x_start[i], z[i]);
        if constexpr (kVariational) {
          const LossParts<F2> parts =
              with_bound(row, call.kind, call.delta, call.detached, d,
                         row.decoder != 0.0f ? decoder_bound(row, d, v[i], x_start[i]) : divergence(row, d, v[i]));
          values[i] = parts.value;
          slopes[i] = factor * parts.slope;
          variance_slopes[i] = factor * parts.variance_slope;
        } else {
          const F2 part = loss_part(call.kind, call.delta, d);
          values[i] = loss_value(call.kind, d, part);
          slopes[i] = factor * part;
        }
      }
      if (call.slope.data != nullptr) four.template store<float>(call.slope, &Place::slope, slopes);
      if constexpr (kVariational) {
        if (call.variance_slope.data != nullptr)
          four.template store<float>(call.variance_slope, &Place::variance_slope, variance_slopes);
      }
      if (!four.has(1)) values[0].v.y = 0.0f;
      if (!four.has(2)) values[1].v.x = 0.0f;
      if (!four.has(3)) values[1].v.y = 0.0f;
    }
    float* const place = losses + 4 * threadIdx.x;
    place[0] = values[0].v.x, place[1] = values[0].v.y, place[2] = values[1].v.x, place[3] = values[1].v.y;
    __syncthreads();
    if (threadIdx.x < 32) {
      const double sum = sum_of_lanes(losses);
      if (threadIdx.x == 0) call.chunks[b * chunks + chunk] = sum;
    }
    __syncthreads();
  }

  if (!comes_last(call.blocks_done + b, gridDim.x, last)) return;
  const double sum = sum_by_strands(call.chunks + b * chunks, chunks, strands);
  if (threadIdx.x == 0)
    call.loss[b] = static_cast<float>(sum * call.per_element * static_cast<double>(weight_of_sum(row)));
  if (call.total == nullptr || !comes_last(call.blocks_done + call.batch, call.batch, last)) return;
  const double total = sum_by_strands(call.loss, call.batch, strands);
  if (threadIdx.x == 0) *call.total = static_cast<float>(total * call.total_factor);
}

template <class Row, Noise kNoise, Access kAccess, class X, class M>
void launch_access(const LossCall& call, cudaStream_t stream) {
  constexpr int64_t kEnoughBlocks = 4096, kMaxGridY = 65535;
  const int64_t chunks = loss_chunks(call.numel), rows = std::min(call.batch, kMaxGridY);
  const int64_t blocks = std::clamp<int64_t>((kEnoughBlocks + call.batch - 1) / call.batch, 1, chunks);
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(rows),
                        static_cast<unsigned>((call.batch + rows - 1) / rows));
  config.blockDim = dim3(kLossThreads);
  config.stream = stream;
  C10_CUDA_CHECK(cudaLaunchKernelEx(&config, loss_of_samples<Row, kNoise, kAccess, X, M>, call, Dividers(call)));
}

template <class Row, Noise kNoise, class X, class M>
void launch_noise_kind(const LossCall& call, cudaStream_t stream) {
  switch (choose_access(
      call, {&call.model_output, &call.variance, &call.x_start, &call.noise, &call.slope, &call.variance_slope})) {
    case Access::vector:
      return launch_access<Row, kNoise, Access::vector, X, M>(call, stream);
    case Access::strided:
      return launch_access<Row, kNoise, Access::strided, X, M>(call, stream);
  }
}

template <class Row, class X, class M>
void launch_row(const LossCall& call, cudaStream_t stream) {
  if (call.noise_kind == Noise::drawn) return launch_noise_kind<Row, Noise::drawn, X, M>(call, stream);
  launch_noise_kind<Row, Noise::given, X, M>(call, stream);
}

template <class X, class M>
void launch(const LossCall& call, cudaStream_t stream) {
  if (call.variational) return launch_row<VariationalRow, X, M>(call, stream);
  launch_row<LossRow, X, M>(call, stream);
}

}  // namespace

void loss(const LossCall& call, int device) {
  on_device(device, [&](cudaStream_t stream) {
    by_dtypes(call.x_start.dtype, call.model_output.dtype,
              [&](auto x, auto m) { launch<decltype(x), decltype(m)>(call, stream); });
  });
}

}  // namespace ddpm_ext::cuda
