// Dynamic thresholding: the magnitudes of core/quantile.h, and the selection of two of them in each sample. The
// magnitudes' first 11 bits are counted while they are computed. Then the next 10 bits are counted of those that share
// the first bits with the magnitude to be found, and then the last 10. In small samples the block that comes last does
// both, so that there is one launch. For large ones each is a launch of as many blocks as the first.
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

// Where the magnitude to be found is: its first bits, and its rank among the magnitudes that begin with them.
struct Place {
  uint32_t first_bits, from_top;
};

// What the threads of a block share: the counts by the next bits of the magnitudes that begin with the first bits, and
// the smallest magnitude whose first bits are larger. The rest is for narrow_down and comes_last.
struct Shared {
  uint32_t bins[kBins], larger, sums[kThreads];
  Place found;
  bool last;
};

// What a launch leaves to the next one, and the blocks of the last one to each other.
struct Search {
  Place place;
  uint32_t larger;
};

// How far apart the samples are in the scratch memory: each has its magnitudes, and behind them its Search.
DDPM_HD constexpr int64_t scratch_stride(int64_t numel) { return (numel + 3) / 4 * 4 + 4; }

__device__ __forceinline__ uint32_t* magnitudes_of(const XStartScaleCall& call, int64_t b) {
  return reinterpret_cast<uint32_t*>(call.scratch) + b * scratch_stride(call.numel);
}

__device__ __forceinline__ Search* search_of(const XStartScaleCall& call, int64_t b) {
  return reinterpret_cast<Search*>(magnitudes_of(call, b) + scratch_stride(call.numel) - 4);
}

__device__ __forceinline__ void clear(Shared& shared) {
  for (int i = threadIdx.x; i < kBins; i += kThreads) shared.bins[i] = 0;
  if (threadIdx.x == 0) shared.larger = kMagnitude;
  __syncthreads();
}

// Finds the next bits of a magnitude by the counts of all, by all threads of a block.
__device__ __forceinline__ Place narrow_down(const Place& place, Shared& shared) {
  constexpr int kEach = kBins / kThreads;
  uint32_t (&sums)[kThreads] = shared.sums;
  const int top = kBins - 1 - static_cast<int>(threadIdx.x) * kEach;
  uint32_t own = 0;
  DDPM_UNROLL
  for (int i = 0; i < kEach; ++i) own += shared.bins[top - i];
  sums[threadIdx.x] = own;
  __syncthreads();
  for (unsigned h = 1; h < kThreads; h *= 2) {
    const uint32_t others = threadIdx.x >= h ? sums[threadIdx.x - h] : 0;
    __syncthreads();
    sums[threadIdx.x] += others;
    __syncthreads();
  }
  uint32_t above = sums[threadIdx.x] - own;
  if (above < place.from_top && place.from_top <= sums[threadIdx.x]) {
    int bin = top;
    while (place.from_top - above > shared.bins[bin]) above += shared.bins[bin--];
    shared.found = {place.first_bits << kBinBits | bin, place.from_top - above};
  }
  __syncthreads();
  return shared.found;
}

// Calls take(value) for a sample's magnitudes, or a block's part of them. A thread has several loads under way before
// it uses the first, since a block may be alone. A sample has fewer than 2^31 magnitudes.
template <class Take>
__device__ __forceinline__ void each_magnitude(const uint32_t* magnitudes, uint32_t numel, uint32_t block,
                                               uint32_t blocks, Take take) {
  constexpr uint32_t kLoads = 4, kTurn = 4 * kThreads * kLoads;
#pragma unroll 1
  for (uint32_t first = block * kTurn + 4 * threadIdx.x; first < numel; first += blocks * kTurn) {
    uint4 words[kLoads] = {};
    DDPM_UNROLL
    for (uint32_t k = 0; k < kLoads; ++k) {
      const uint32_t i = first + 4 * kThreads * k;
      load_word_if(i < numel, reinterpret_cast<const uint4*>(magnitudes + i), words[k]);
    }
    DDPM_UNROLL
    for (uint32_t k = 0; k < kLoads; ++k) {
      const uint32_t i = first + 4 * kThreads * k;  // the last word may reach beyond the sample's end
      if (i < numel) take(words[k].x);
      if (i + 1 < numel) take(words[k].y);
      if (i + 2 < numel) take(words[k].z);
      if (i + 3 < numel) take(words[k].w);
    }
  }
}

// Counts the next bits, from `shift` on, of the magnitudes that begin with the first bits: of a sample, or of a block's
// part of it.
__device__ __forceinline__ void count_bits(const XStartScaleCall& call, int64_t b, uint32_t block, uint32_t blocks,
                                           const Place& place, int shift, Shared& shared) {
  clear(shared);
  uint32_t larger = kMagnitude;
  each_magnitude(magnitudes_of(call, b), static_cast<uint32_t>(call.numel), block, blocks, [&](uint32_t value) {
    const uint32_t first = value >> (shift + kBinBits);
    if (first == place.first_bits) atomicAdd(shared.bins + (value >> shift & ((1u << kBinBits) - 1)), 1u);
    if (first > place.first_bits && value < larger) larger = value;
  });
  DDPM_UNROLL
  for (int h = 16; h > 0; h /= 2) {
    const uint32_t other = __shfl_xor_sync(0xffffffffu, larger, h);
    if (other < larger) larger = other;
  }
  if (threadIdx.x % 32 == 0) atomicMin(&shared.larger, larger);
  __syncthreads();
}

// Adds the block's counts to the sample's, which are zeros before a launch and after it. Returns whether the block is
// the last to do so, which has the sample's counts then.
__device__ __forceinline__ bool has_counts_of_all(Shared& shared, uint32_t* counts, int64_t batch, int64_t b) {
  if (gridDim.x == 1) return true;
  uint32_t* const all = counts + batch + b * kBins;
  for (int i = threadIdx.x; i < kBins; i += kThreads)
    if (shared.bins[i] != 0) atomicAdd(all + i, shared.bins[i]);
  if (!comes_last(counts + b, gridDim.x, shared.last)) return false;
  for (int i = threadIdx.x; i < kBins; i += kThreads) shared.bins[i] = of_others(all + i), all[i] = 0;
  __syncthreads();
  return true;
}

// Stores a sample's factor, by all threads of a block that has counted the last bits.
__device__ __forceinline__ void finish(const XStartScaleCall& call, int64_t b, const Place& place, Shared& shared) {
  const auto [below, from_top] = narrow_down(place, shared);
  constexpr uint32_t kAll = (1u << kBinBits) - 1;
  for (uint32_t i = (below & kAll) + 1 + threadIdx.x; i <= kAll; i += kThreads)
    if (shared.bins[i] != 0) atomicMin(&shared.larger, place.first_bits << kBinBits | i);
  __syncthreads();
  if (threadIdx.x != 0) return;
  const uint32_t above = call.rank.between() && from_top == 1 ? shared.larger : below;
  call.scale[b] = threshold_scale(below, above, call.rank.weight, call.maximum);
}

// With how many blocks at most a sample is finished by one of them, whose passes over all magnitudes then take no more
// time than two launches.
constexpr unsigned kBlocksOfOneLaunch = 4;

// `counts` are zeros for the samples, of the blocks that have finished their part, and then, if a sample has several
// blocks, kBins for each sample. The launch leaves them as zeros.
template <Access kAccess, class X, class M>
__global__ void __launch_bounds__(kThreads)
    threshold_samples(const __grid_constant__ XStartScaleCall call, const __grid_constant__ Dividers dividers,
                      uint32_t* counts) {
  using Index = IndexOf<kAccess>;
  __shared__ Shared shared;
  const Index b = sample_of_block<Index>();
  if (b >= static_cast<Index>(call.batch)) return;
  clear(shared);

  StepRow row{};
  const bool predicts = call.table != nullptr;
  if (predicts) row = static_cast<const StepRow*>(call.table)[sample_row(call, b)];
  const bool guided = call.uncond_output.data != nullptr && row.w != 1.0f;
  const F2 scale(of_sample(call.output_scale, b));
  uint32_t* const magnitudes = magnitudes_of(call, b);
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
      if (j + i < numel) atomicAdd(shared.bins + (bits[i] >> 2 * kBinBits), 1u);
    }
    store_word(reinterpret_cast<uint4*>(magnitudes + j), uint4{bits[0], bits[1], bits[2], bits[3]});
  }
  __syncthreads();

  if (!has_counts_of_all(shared, counts, call.batch, b)) return;
  const bool nan = shared.bins[kBins - 1] != 0;  // the quantile is NaN, too, which is the largest magnitude
  Place place = narrow_down({0, nan ? 1 : static_cast<uint32_t>(call.rank.from_top)}, shared);
  if (gridDim.x > kBlocksOfOneLaunch) {
    if (threadIdx.x == 0) *search_of(call, b) = {place, kMagnitude};
    return;
  }
#pragma unroll 1  // or it would take more registers
  for (int shift = kBinBits;; shift = 0) {
    count_bits(call, b, 0, 1, place, shift, shared);
    if (shift == 0) return finish(call, b, place, shared);
    place = narrow_down(place, shared);
  }
}

// Goes on where threshold_samples has ended, or this kernel before: with kBinBits for `shift`, and then with 0.
__global__ void __launch_bounds__(kThreads)
    search_samples(const __grid_constant__ XStartScaleCall call, uint32_t* counts, int shift) {
  __shared__ Shared shared;
  const int64_t b = sample_of_block<int64_t>();
  if (b >= call.batch) return;
  Search* const search = search_of(call, b);
  const Place place = search->place;
  count_bits(call, b, blockIdx.x, gridDim.x, place, shift, shared);
  if (shift == 0 && threadIdx.x == 0) atomicMin(&search->larger, shared.larger);
  if (!has_counts_of_all(shared, counts, call.batch, b)) return;
  if (shift == 0) {
    if (threadIdx.x == 0) shared.larger = of_others(&search->larger);
    return finish(call, b, place, shared);
  }
  const Place next = narrow_down(place, shared);
  if (threadIdx.x == 0) search->place = next;
}

// How many elements of a sample a block should have, since each block's counts are added to the sample's.
constexpr int64_t kWorthABlock = 8192;

template <Access kAccess, class X, class M>
void launch(const XStartScaleCall& call, int device, cudaStream_t stream) {
  constexpr auto kKernel = threshold_samples<kAccess, X, M>;
  const int64_t worth = divide_up(call.numel, kWorthABlock);
  const Shape shape = shape_of_samples(call.batch, worth, kThreads, room_for<kKernel>(kThreads).blocks);
  const Counts counts(shape.grid.x > 1 ? call.batch * (1 + kBins) : call.batch, device, stream);
  launch_on<kKernel>(shape, stream, call, Dividers(call), counts.data());
  if (shape.grid.x <= kBlocksOfOneLaunch) return;
  for (const int shift : {kBinBits, 0}) launch_on<search_samples>(shape, stream, call, counts.data(), shift);
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
