// Rescaled guidance: computes the moments of every chunk (core/spread.h) and the factor of every sample, in one launch.
// Two warps of a block compute the moments of a chunk: one warp those of the model's output, the other those of the
// guided output.
#include "core/spread.h"

#include "core/step.h"
#include "cuda/four.cuh"
#include "cuda/launch.cuh"
#include "cuda/operators.h"
#include "cuda/sums.cuh"

namespace ddpm_ext::cuda {
namespace {

// Returns the sum of `lane` over the lanes of a warp, to every lane.
__device__ __forceinline__ double sum_of_warp(float lane) {
  double sum = static_cast<double>(lane + __shfl_xor_sync(0xffffffffu, lane, kSpreadLanes / 2));
  DDPM_UNROLL
  for (int h = kSpreadLanes / 4; h > 0; h /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, h);
  return sum;
}

// Returns the moments of a chunk of `length` values. All lanes of a warp call this together.
__device__ __forceinline__ ChunkMoments moments_of(const float* values, int length) {
  static_assert(kSpreadLanes == 32);
  const int l = threadIdx.x % kSpreadLanes;
  LaneMoments<float> lane;
  lane.begin(l < length ? values[l] : 0.0f);
  DDPM_UNROLL
  for (int i = kSpreadLanes; i < kLossChunk; i += kSpreadLanes)
    if (i + l < length) lane.add(lane.difference(values[i + l]));
  const float n = static_cast<float>(lane_length(length, l));
  const float mean = chunk_mean(sum_of_warp(lane.total(n)), length);
  return {mean, sum_of_warp(lane.squares_from(mean, n))};
}

// Computes the factors of all samples. `counts` has a counter for each sample, which counts its finished blocks and is
// zero before and after the launch.
template <Access kAccess, class M>
__global__ void __launch_bounds__(kLossThreads)
    spread_of_samples(const __grid_constant__ OutputScaleCall call, const __grid_constant__ Dividers dividers,
                      uint32_t* counts) {
  using Index = IndexOf<kAccess>;
  alignas(16) __shared__ float values[2][kLossChunk];
  __shared__ double strands[kLossStrands];
  __shared__ bool last;
  const Index b = sample_of_block<Index>();
  if (b >= static_cast<Index>(call.batch)) return;

  const Index chunks = static_cast<Index>(loss_chunks(call.numel));
  ChunkMoments* const moments = call.chunks + 2 * static_cast<int64_t>(b) * chunks;
  for (Index chunk = blockIdx.x; chunk < chunks; chunk += gridDim.x) {
    const Index j = chunk * kLossChunk + 4 * threadIdx.x;
    F2 outputs[2][2];  // [0]: the model's output; [1]: the unconditional output, which the guided output replaces
    load_four<kAccess, M>(call, dividers, call.model_output, b, j, outputs[0]);
    load_four<kAccess, M>(call, dividers, call.uncond_output, b, j, outputs[1]);
    __syncthreads();  // waits until no thread reads the values of the previous chunk
    DDPM_UNROLL
    for (int i = 0; i < 2; ++i) outputs[1][i] = guide(call.guidance, outputs[0][i], outputs[1][i]);
    DDPM_UNROLL
    for (int k = 0; k < 2; ++k)
      *reinterpret_cast<float4*>(values[k] + 4 * threadIdx.x) =
          float4{outputs[k][0].v.x, outputs[k][0].v.y, outputs[k][1].v.x, outputs[k][1].v.y};
    __syncthreads();
    const unsigned k = threadIdx.x / kSpreadLanes;
    if (k < 2) {
      const ChunkMoments chunk_moments = moments_of(values[k], static_cast<int>(chunk_length(call.numel, chunk)));
      if (threadIdx.x % kSpreadLanes == 0) moments[2 * chunk + k] = chunk_moments;
    }
  }

  if (!comes_last(counts + b, gridDim.x, last)) return;
  double squares[2];
  DDPM_UNROLL
  for (int k = 0; k < 2; ++k) {
    const auto chunk_at = [&](int64_t i) {
      const ChunkMoments& chunk = moments[2 * i + k];
      return ChunkMoments{read_of_other_block(&chunk.mean), read_of_other_block(&chunk.squares)};
    };
    const double sum =
        sum_by_strands(chunks, [&](int64_t i) { return sum_term(chunk_at(i), chunk_length(call.numel, i)); }, strands);
    const double mean = sum / static_cast<double>(call.numel);
    squares[k] = sum_by_strands(
        chunks, [&](int64_t i) { return squares_term(chunk_at(i), chunk_length(call.numel, i), mean); }, strands);
  }
  if (threadIdx.x == 0) call.scale[b] = spread_scale(squares[0], squares[1], call.rescale);
}

template <Access kAccess, class M>
void launch(const OutputScaleCall& call, int device, cudaStream_t stream) {
  constexpr auto kKernel = spread_of_samples<kAccess, M>;
  const Shape shape =
      shape_of_samples(call.batch, loss_chunks(call.numel), kLossThreads, room_for<kKernel>(kLossThreads).blocks);
  const Counts counts(call.batch, device, stream);
  launch_on<kKernel>(shape, stream, call, Dividers(call), counts.data());
}

}  // namespace

void output_scale(const OutputScaleCall& call, int device) {
  on_device(device, [&](cudaStream_t stream) {
    by_dtypes(call.model_output.dtype, call.model_output.dtype, [&](auto m, auto) {
      if (choose_access(call, {&call.model_output, &call.uncond_output}) == Access::vector)
        launch<Access::vector, decltype(m)>(call, device, stream);
      else
        launch<Access::strided, decltype(m)>(call, device, stream);
    });
  });
}

}  // namespace ddpm_ext::cuda
