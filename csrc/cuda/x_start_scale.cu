// Dynamic thresholding: the magnitudes of core/quantile.h, and the selection of two of them in each sample, in one
// launch. The magnitudes' first 11 bits are counted while they are computed. The block that comes last to a sample
// counts the next 10 bits of those that share the first bits with the magnitude to be found, and then the last 10.
#include "core/quantile.h"

#include "core/step.h"
#include "cuda/four.cuh"
#include "cuda/launch.cuh"
#include "cuda/operators.h"
#include "cuda/sums.cuh"

namespace ddpm_ext::cuda {
namespace {

constexpr int kBins = 2048, kBinBits = 10;  // a count by the first bits, which are 11, takes all bins
constexpr uint32_t kNan = kMagnitude;       // the only NaN among magnitudes, alone in the last bin

// The bin in which a magnitude lies, and its rank among those of the bin.
struct Bin {
  uint32_t index, from_top;
};

// Finds the bin of the from_top-th largest magnitude. The counts of the bins are those of all threads of a block.
__device__ __forceinline__ Bin find_bin(const uint32_t (&bins)[kBins], uint32_t from_top, uint32_t (&sums)[kThreads],
                                        Bin& found) {
  constexpr int kEach = kBins / kThreads;
  const int top = kBins - 1 - static_cast<int>(threadIdx.x) * kEach;
  uint32_t own = 0;
  DDPM_UNROLL
  for (int i = 0; i < kEach; ++i) own += bins[top - i];
  sums[threadIdx.x] = own;
  __syncthreads();
  for (unsigned h = 1; h < kThreads; h *= 2) {
    const uint32_t others = threadIdx.x >= h ? sums[threadIdx.x - h] : 0;
    __syncthreads();
    sums[threadIdx.x] += others;
    __syncthreads();
  }
  uint32_t above = sums[threadIdx.x] - own;
  if (above < from_top && from_top <= sums[threadIdx.x]) {
    int bin = top;
    while (from_top - above > bins[bin]) above += bins[bin--];
    found = {static_cast<uint32_t>(bin), from_top - above};
  }
  __syncthreads();
  return found;
}

// Calls take(value) for all of a sample's magnitudes, by the threads of one block. Since that block is alone, each
// thread has several loads under way before it uses the first.
template <class Take>
__device__ __forceinline__ void each_magnitude(const uint32_t* magnitudes, int64_t numel, Take take) {
  constexpr int kLoads = 4;
#pragma unroll 1
  for (int64_t first = 4 * threadIdx.x; first < numel; first += 4 * kThreads * kLoads) {
    uint4 words[kLoads] = {};
    DDPM_UNROLL
    for (int k = 0; k < kLoads; ++k) {
      const int64_t i = first + 4 * kThreads * k;
      load_word_if(i < numel, reinterpret_cast<const uint4*>(magnitudes + i), words[k]);
    }
    DDPM_UNROLL
    for (int k = 0; k < kLoads; ++k) {
      const int64_t left = numel - first - 4 * kThreads * k;  // the last word may reach beyond the sample's end
      if (left > 0) take(words[k].x);
      if (left > 1) take(words[k].y);
      if (left > 2) take(words[k].z);
      if (left > 3) take(words[k].w);
    }
  }
}

// The smallest of a sample's magnitudes above `least`, found by all threads of a block.
__device__ __forceinline__ uint32_t next_larger(const uint32_t* magnitudes, int64_t numel, uint32_t least,
                                                uint32_t (&smallest)[kThreads]) {
  uint32_t own = kMagnitude;
  each_magnitude(magnitudes, numel, [&](uint32_t value) {
    if (value > least && value < own) own = value;
  });
  __syncthreads();
  smallest[threadIdx.x] = own;
  for (unsigned h = kThreads / 2; h > 0; h /= 2) {
    __syncthreads();
    const uint32_t other = threadIdx.x < h ? smallest[threadIdx.x + h] : kMagnitude;
    if (other < smallest[threadIdx.x]) smallest[threadIdx.x] = other;
  }
  __syncthreads();
  return smallest[0];
}

__device__ __forceinline__ void clear(uint32_t (&bins)[kBins]) {
  for (int i = threadIdx.x; i < kBins; i += kThreads) bins[i] = 0;
  __syncthreads();
}

// How far apart the samples are in the scratch memory.
DDPM_HD constexpr int64_t scratch_stride(int64_t numel) { return (numel + 3) / 4 * 4; }

// `counts` are zeros for the samples, of the blocks that have finished their part, and then, if a sample has several
// blocks, kBins for each sample. The launch leaves them as zeros.
template <Access kAccess, class X, class M>
__global__ void __launch_bounds__(kThreads)
    threshold_samples(const __grid_constant__ XStartScaleCall call, const __grid_constant__ Dividers dividers,
                      uint32_t* counts) {
  using Index = IndexOf<kAccess>;
  __shared__ uint32_t bins[kBins];
  __shared__ uint32_t sums[kThreads];
  __shared__ Bin found;
  __shared__ bool last;
  const Index b = sample_of_block<Index>();
  if (b >= static_cast<Index>(call.batch)) return;
  clear(bins);

  StepRow row{};
  const bool predicts = call.table != nullptr;
  if (predicts) row = static_cast<const StepRow*>(call.table)[sample_row(call, b)];
  const bool guided = call.uncond_output.data != nullptr && row.w != 1.0f;
  const F2 scale(of_sample(call.output_scale, b));
  uint32_t* const magnitudes = reinterpret_cast<uint32_t*>(call.scratch) + b * scratch_stride(call.numel);
  const Index numel = static_cast<Index>(call.numel), step = static_cast<Index>(gridDim.x) * kThreads * 4;
  for (Index j = (static_cast<Index>(blockIdx.x) * kThreads + threadIdx.x) * 4; j < numel; j += step) {
    F2 x[2], m[2], u[2];
    load_four<kAccess, X>(call, dividers, call.x, b, j, x);
    if (predicts) {
      load_four<kAccess, M>(call, dividers, call.model_output, b, j, m);
      if (guided) load_four<kAccess, M>(call, dividers, call.uncond_output, b, j, u);
      DDPM_UNROLL
      for (int i = 0; i < 2; ++i) {
        if (guided) m[i] = guide(row.w, m[i], u[i]);
        x[i] = unclipped_x_start(row.a, row.b, x[i], m[i] * scale);
      }
    }
    uint32_t bits[4] = {ddpm_ext::float_to_bits(x[0].v.x), ddpm_ext::float_to_bits(x[0].v.y),
                        ddpm_ext::float_to_bits(x[1].v.x), ddpm_ext::float_to_bits(x[1].v.y)};
    DDPM_UNROLL
    for (int i = 0; i < 4; ++i) {
      bits[i] &= kMagnitude;
      if (bits[i] > kInfiniteMagnitude) bits[i] = kNan;
      if (j + i < numel) atomicAdd(bins + (bits[i] >> 2 * kBinBits), 1u);
    }
    store_word(reinterpret_cast<uint4*>(magnitudes + j), uint4{bits[0], bits[1], bits[2], bits[3]});
  }
  __syncthreads();

  if (gridDim.x > 1) {
    uint32_t* const all = counts + call.batch + static_cast<int64_t>(b) * kBins;
    for (int i = threadIdx.x; i < kBins; i += kThreads)
      if (bins[i] != 0) atomicAdd(all + i, bins[i]);
    if (!comes_last(counts + b, gridDim.x, last)) return;
    for (int i = threadIdx.x; i < kBins; i += kThreads) bins[i] = of_others(all + i), all[i] = 0;
    __syncthreads();
  }
  uint32_t below = kNan, above = kNan;
  if (bins[kBins - 1] == 0) {
    Bin bin = find_bin(bins, static_cast<uint32_t>(call.rank.from_top), sums, found);
    below = bin.index;
    for (int shift = kBinBits; shift >= 0; shift -= kBinBits) {
      clear(bins);
      each_magnitude(magnitudes, call.numel, [&](uint32_t value) {
        if (value >> (shift + kBinBits) == below) atomicAdd(bins + (value >> shift & ((1u << kBinBits) - 1)), 1u);
      });
      __syncthreads();
      bin = find_bin(bins, bin.from_top, sums, found);
      below = below << kBinBits | bin.index;
    }
    above = call.rank.between() && bin.from_top == 1 ? next_larger(magnitudes, call.numel, below, sums) : below;
  }
  if (threadIdx.x == 0) call.scale[b] = threshold_scale(below, above, call.rank.weight, call.maximum);
}

// How many elements of a sample a block should have, since each block's counts are added to the sample's.
constexpr int64_t kWorthABlock = 8192;

template <Access kAccess, class X, class M>
void launch(const XStartScaleCall& call, int device, cudaStream_t stream) {
  constexpr auto kKernel = threshold_samples<kAccess, X, M>;
  const int64_t worth = divide_up(call.numel, kWorthABlock);
  const Shape shape = shape_of_samples(call.batch, worth, kThreads, blocks_at_once<kKernel>(kThreads));
  const Counts counts(shape.grid.x > 1 ? call.batch * (1 + kBins) : call.batch, device, stream);
  launch_on<kKernel>(shape, stream, call, Dividers(call), counts.data());
}

}  // namespace

int64_t x_start_scale_scratch(int64_t batch, int64_t numel) { return batch * scratch_stride(numel); }

void x_start_scale(const XStartScaleCall& call, int device) {
  on_device(device, [&](cudaStream_t stream) {
    by_dtypes(call.x.dtype, call.model_output.dtype, [&](auto x, auto m) {
      const bool vector = call.output_scale.stride < int64_t{1} << 32 &&
                          choose_access(call, {&call.x, &call.model_output, &call.uncond_output}) == Access::vector;
      if (vector) return launch<Access::vector, decltype(x), decltype(m)>(call, device, stream);
      launch<Access::strided, decltype(x), decltype(m)>(call, device, stream);
    });
  });
}

}  // namespace ddpm_ext::cuda
