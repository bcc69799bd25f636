// Dynamic thresholding: computes the magnitudes of core/quantile.h, and selects two of them in each sample, by radix
// selection. While the magnitudes are computed, their first 11 bits are counted. Among the magnitudes that share their
// first bits with the wanted one, the next 10 bits are counted, and then the last 10. In small samples, the last block
// to finish does these two counts, so that there is one launch. For large samples, each count is a launch with as many
// blocks as the first launch.
#include "core/quantile.h"

#include "core/step.h"
#include "cuda/four.cuh"
#include "cuda/launch.cuh"
#include "cuda/operators.h"
#include "cuda/sums.cuh"

namespace ddpm_ext::cuda {
namespace {

constexpr int kBins = 2048, kBinBits = 10;  // only the count of the first 11 bits uses all bins
constexpr uint32_t kNan = kMagnitude;       // the only NaN among magnitudes, alone in the last bin

// The search for the quantile's magnitude so far: its first bits, and its rank (from the largest) among the magnitudes
// that begin with these bits.
struct Prefix {
  uint32_t first_bits, from_top;
};

// The shared memory of a block: the counts of the next bits among the magnitudes that begin with the first bits, and
// the smallest magnitude whose first bits are larger. The other members are for narrow_down and comes_last.
struct Shared {
  uint32_t bins[kBins], larger, sums[kThreads];
  Prefix found;
  bool last;
};

// The state of the search that one launch passes to the next, and the last launch's blocks to each other.
struct Search {
  Prefix prefix;
  uint32_t larger;
};

// The distance between samples in the scratch memory, in 32-bit words. Each sample has its magnitudes, followed by its
// Search.
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

// Finds the next bits of the wanted magnitude from the counts, by all threads of a block.
__device__ __forceinline__ Prefix narrow_down(const Prefix& prefix, Shared& shared) {
  constexpr int kEach = kBins / kThreads;
  uint32_t (&sums)[kThreads] = shared.sums;
  const int top = kBins - 1 - static_cast<int>(threadIdx.x) * kEach;
  uint32_t own_count = 0;
  DDPM_UNROLL
  for (int i = 0; i < kEach; ++i) own_count += shared.bins[top - i];
  sums[threadIdx.x] = own_count;
  __syncthreads();
  for (unsigned h = 1; h < kThreads; h *= 2) {
    const uint32_t previous = threadIdx.x >= h ? sums[threadIdx.x - h] : 0;
    __syncthreads();
    sums[threadIdx.x] += previous;
    __syncthreads();
  }
  uint32_t above = sums[threadIdx.x] - own_count;
  if (above < prefix.from_top && prefix.from_top <= sums[threadIdx.x]) {
    int bin = top;
    while (prefix.from_top - above > shared.bins[bin]) above += shared.bins[bin--];
    shared.found = {prefix.first_bits << kBinBits | bin, prefix.from_top - above};
  }
  __syncthreads();
  return shared.found;
}

// Calls take(value) for the magnitudes of a sample, or of a block's part of it. A thread has several loads in flight
// before it uses the first, since its block may be the only one running. A sample has fewer than 2^31 magnitudes.
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

// Counts the next bits (those from bit `shift` on) of the magnitudes that begin with the first bits. Covers a whole
// sample, or a block's part of it.
__device__ __forceinline__ void count_bits(const XStartScaleCall& call, int64_t b, uint32_t block, uint32_t blocks,
                                           const Prefix& prefix, int shift, Shared& shared) {
  clear(shared);
  uint32_t larger = kMagnitude;
  each_magnitude(magnitudes_of(call, b), static_cast<uint32_t>(call.numel), block, blocks, [&](uint32_t value) {
    const uint32_t first = value >> (shift + kBinBits);
    if (first == prefix.first_bits) atomicAdd(shared.bins + (value >> shift & ((1u << kBinBits) - 1)), 1u);
    if (first > prefix.first_bits && value < larger) larger = value;
  });
  DDPM_UNROLL
  for (int h = 16; h > 0; h /= 2) {
    const uint32_t other = __shfl_xor_sync(0xffffffffu, larger, h);
    if (other < larger) larger = other;
  }
  if (threadIdx.x % 32 == 0) atomicMin(&shared.larger, larger);
  __syncthreads();
}

// Adds the block's counts to the sample's counts, which are zero before and after a launch. Returns whether the block
// is the last to do so. In that block, `shared` has the sample's counts then.
__device__ __forceinline__ bool has_counts_of_all(Shared& shared, uint32_t* counts, int64_t batch, int64_t b) {
  if (gridDim.x == 1) return true;
  uint32_t* const sample_counts = counts + batch + b * kBins;
  for (int i = threadIdx.x; i < kBins; i += kThreads)
    if (shared.bins[i] != 0) atomicAdd(sample_counts + i, shared.bins[i]);
  if (!comes_last(counts + b, gridDim.x, shared.last)) return false;
  for (int i = threadIdx.x; i < kBins; i += kThreads)
    shared.bins[i] = of_others(sample_counts + i), sample_counts[i] = 0;
  __syncthreads();
  return true;
}

// Stores a sample's factor, by all threads of a block that has the counts of the last bits.
__device__ __forceinline__ void finish(const XStartScaleCall& call, int64_t b, const Prefix& prefix, Shared& shared) {
  const auto [below, from_top] = narrow_down(prefix, shared);
  constexpr uint32_t kAll = (1u << kBinBits) - 1;
  for (uint32_t i = (below & kAll) + 1 + threadIdx.x; i <= kAll; i += kThreads)
    if (shared.bins[i] != 0) atomicMin(&shared.larger, prefix.first_bits << kBinBits | i);
  __syncthreads();
  if (threadIdx.x != 0) return;
  const uint32_t above = call.rank.between() && from_top == 1 ? shared.larger : below;
  call.scale[b] = threshold_scale(below, above, call.rank.weight, call.maximum);
}

// The most blocks of a sample for which one block finishes the sample in the same launch. Up to this number, its passes
// over all magnitudes take no more time than two launches.
constexpr unsigned kBlocksOfOneLaunch = 4;

// `counts` has a zero for each sample: the number of blocks that have finished their part. If a sample has several
// blocks, kBins zeros for each sample follow. The launch leaves the counts at zero.
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
  const bool nan = shared.bins[kBins - 1] != 0;  // then the quantile is NaN, the largest magnitude
  Prefix prefix = narrow_down({0, nan ? 1 : static_cast<uint32_t>(call.rank.from_top)}, shared);
  if (gridDim.x > kBlocksOfOneLaunch) {
    if (threadIdx.x == 0) *search_of(call, b) = {prefix, kMagnitude};
    return;
  }
#pragma unroll 1  // unrolled, it would take more registers
  for (int shift = kBinBits;; shift = 0) {
    count_bits(call, b, 0, 1, prefix, shift, shared);
    if (shift == 0) return finish(call, b, prefix, shared);
    prefix = narrow_down(prefix, shared);
  }
}

// Continues after threshold_samples, or after this kernel's previous launch. The first launch has kBinBits for `shift`,
// the second has 0.
__global__ void __launch_bounds__(kThreads)
    search_samples(const __grid_constant__ XStartScaleCall call, uint32_t* counts, int shift) {
  __shared__ Shared shared;
  const int64_t b = sample_of_block<int64_t>();
  if (b >= call.batch) return;
  Search* const search = search_of(call, b);
  const Prefix prefix = search->prefix;
  count_bits(call, b, blockIdx.x, gridDim.x, prefix, shift, shared);
  if (shift == 0 && threadIdx.x == 0) atomicMin(&search->larger, shared.larger);
  if (!has_counts_of_all(shared, counts, call.batch, b)) return;
  if (shift == 0) {
    if (threadIdx.x == 0) shared.larger = of_others(&search->larger);
    return finish(call, b, prefix, shared);
  }
  const Prefix next = narrow_down(prefix, shared);
  if (threadIdx.x == 0) search->prefix = next;
}

// The number of elements for which another block is worthwhile, since each block's counts have to be added to the
// sample's.
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
