// Rescaled guidance: the moments of core/spread.h for every chunk, and each sample's factor, in one launch.
#include "core/spread.h"

#include <algorithm>

#include "core/step.h"
#include "cuda/counts.cuh"
#include "cuda/four.cuh"
#include "cuda/launch.cuh"
#include "cuda/operators.h"
#include "cuda/sums.cuh"

namespace ddpm_ext::cuda {
namespace {

// Adds up the values of a chunk, of which each thread has four of the model's output and four of the guided one, by a
// warp for each. Those from `valid` on lie beyond the sample's end.
__device__ __forceinline__ void add_up(const F2 (&values)[2][2], int64_t valid, float (&places)[2][kLossChunk],
                                       double (&sums)[2]) {
  const unsigned warp = threadIdx.x / 32;
  __syncthreads();  // until nobody reads the values and the sums before these
  DDPM_UNROLL
  for (int k = 0; k < 2; ++k) {
    float* const place = places[k] + 4 * threadIdx.x;
    place[0] = valid > 0 ? values[k][0].v.x : 0.0f, place[1] = valid > 1 ? values[k][0].v.y : 0.0f;
    place[2] = valid > 2 ? values[k][1].v.x : 0.0f, place[3] = valid > 3 ? values[k][1].v.y : 0.0f;
  }
  __syncthreads();
  if (warp < 2) {
    const double sum = sum_of_lanes(places[warp]);
    if (threadIdx.x % 32 == 0) sums[warp] = sum;
  }
  __syncthreads();
}

// `counts` are zeros for the samples, of the blocks that have finished their part. The launch leaves them as zeros.
template <Access kAccess, class M>
__global__ void __launch_bounds__(kLossThreads)
    spread_of_samples(const __grid_constant__ OutputScaleCall call, const __grid_constant__ Dividers dividers,
                      uint32_t* counts) {
  using Index = IndexOf<kAccess>;
  __shared__ float places[2][kLossChunk];
  __shared__ double sums[2];
  __shared__ double strands[kLossStrands];
  __shared__ bool last;
  const Index b = sample_of_block<Index>();
  if (b >= static_cast<Index>(call.batch)) return;

  const Index chunks = static_cast<Index>(loss_chunks(call.numel));
  ChunkMoments* const moments = call.chunks + 2 * static_cast<int64_t>(b) * chunks;
  for (Index chunk = blockIdx.x; chunk < chunks; chunk += gridDim.x) {
    const Index j = chunk * kLossChunk + 4 * threadIdx.x;
    const int64_t length = chunk_length(call.numel, chunk), valid = length - 4 * static_cast<int64_t>(threadIdx.x);
    F2 outputs[2][2];  // the model's, and the unconditional one, which becomes the guided one
    load_four<kAccess, M>(call, dividers, call.model_output, b, j, outputs[0]);
    load_four<kAccess, M>(call, dividers, call.uncond_output, b, j, outputs[1]);
    DDPM_UNROLL
    for (int i = 0; i < 2; ++i) outputs[1][i] = guide(call.guidance, outputs[0][i], outputs[1][i]);
    add_up(outputs, valid, places, sums);
    const float means[2] = {chunk_mean(sums[0], length), chunk_mean(sums[1], length)};
    DDPM_UNROLL
    for (int i = 0; i < 2; ++i) {
      outputs[0][i] = squared_difference(means[0], outputs[0][i]);
      outputs[1][i] = squared_difference(means[1], outputs[1][i]);
    }
    add_up(outputs, valid, places, sums);
    if (threadIdx.x == 0) moments[2 * chunk] = {means[0], sums[0]};
    if (threadIdx.x == 1) moments[2 * chunk + 1] = {means[1], sums[1]};
  }

  if (!comes_last(counts + b, gridDim.x, last)) return;
  double squares[2];
  DDPM_UNROLL
  for (int k = 0; k < 2; ++k) {
    const auto chunk_at = [&](int64_t i) {
      const ChunkMoments& chunk = moments[2 * i + k];
      return ChunkMoments{of_others(&chunk.mean), of_others(&chunk.squares)};
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
  const int64_t rows = std::min(call.batch, kMaxGridY);
  const int64_t enough = divide_up(2 * blocks_at_once<kKernel>(kLossThreads), call.batch);
  const Shape shape = {dim3(static_cast<unsigned>(std::min(enough, loss_chunks(call.numel))),
                            static_cast<unsigned>(rows), static_cast<unsigned>(divide_up(call.batch, rows))),
                       dim3(kLossThreads)};
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
