// Dynamic thresholding: computes the magnitudes |x0| of each sample and selects the two between which the quantile is
// interpolated (core/quantile.h), by radix selection. A magnitude has 31 bits.
// - The first histogram counts the first 11 bits of all magnitudes, while they are computed. It gives the first 11 bits
//   of the wanted magnitude.
// - The second histogram counts the next 10 bits, of the magnitudes that begin with these 11 bits.
// - The third histogram counts the last 10 bits, of the magnitudes that begin with the 21 bits known by then.
// If a sample has few blocks, the last block to finish counts the second and the third histogram, so that one launch
// suffices. Otherwise each further histogram is a launch with as many blocks as the first one.
#include "core/quantile.h"

#include "core/step.h"
#include "cuda/four.cuh"
#include "cuda/launch.cuh"
#include "cuda/operators.h"
#include "cuda/sums.cuh"

namespace ddpm_ext::cuda {
namespace {

constexpr int kBins = 2048, kBinBits = 10;  // only the histogram of the first 11 bits uses all bins
constexpr uint32_t kNan = kMagnitude;       // replaces the bits of every NaN, and is alone in the last bin

// The known first bits of the wanted magnitude, and its rank among the magnitudes that begin with these bits. The rank
// 1 is the largest magnitude.
struct Prefix {
  uint32_t first_bits, from_top;
};

// The shared memory of a block. `bins` is a histogram of the magnitudes that begin with a Prefix's bits. `larger` is
// the smallest of the magnitudes whose first bits are larger than the Prefix's. narrow_down uses `sums` and `result`,
// and comes_last uses `last`.
struct Shared {
  uint32_t bins[kBins], larger, sums[kThreads];
  Prefix result;
  bool last;
};

// The state of the search in scratch memory. A launch passes `prefix` to the next launch. The blocks of the last launch
// share `larger`, which has the meaning of Shared::larger.
struct Search {
  Prefix prefix;
  uint32_t larger;
};

// Returns the distance from one sample to the next in the scratch memory, in 32-bit words. A sample's magnitudes come
// first, padded to a multiple of four, and then its Search.
DDPM_HD constexpr int64_t scratch_stride(int64_t numel) { return (numel + 3) / 4 * 4 + 4; }

__device__ __forceinline__ uint32_t* magnitudes_of(const XStartScaleCall& call, int64_t b) {
  return reinterpret_cast<uint32_t*>(call.scratch) + b * scratch_stride(call.numel);
}

__device__ __forceinline__ Search* search_of(const XStartScaleCall& call, int64_t b) {
  return reinterpret_cast<Search*>(magnitudes_of(call, b) + scratch_stride(call.numel) - 4);
}

// Empties the histogram and sets `larger` to the largest magnitude. All threads of a block call this together.
__device__ __forceinline__ void clear(Shared& shared) {
  for (int i = threadIdx.x; i < kBins; i += kThreads) shared.bins[i] = 0;
  if (threadIdx.x == 0) shared.larger = kMagnitude;
  __syncthreads();
}

// Returns a longer prefix of the wanted magnitude, from the histogram of the bits that follow `prefix`. A thread adds
// up kBinsOfThread bins, and the thread with the wanted bin writes the result. All threads of a block call this
// together.
__device__ __forceinline__ Prefix narrow_down(const Prefix& prefix, Shared& shared) {
  constexpr int kBinsOfThread = kBins / kThreads;
  uint32_t (&sums)[kThreads] = shared.sums;
  const int top = kBins - 1 - static_cast<int>(threadIdx.x) * kBinsOfThread;
  uint32_t thread_count = 0;
  DDPM_UNROLL
  for (int i = 0; i < kBinsOfThread; ++i) thread_count += shared.bins[top - i];
  sums[threadIdx.x] = thread_count;
  __syncthreads();
  for (unsigned h = 1; h < kThreads; h *= 2) {
    const uint32_t previous = threadIdx.x >= h ? sums[threadIdx.x - h] : 0;
    __syncthreads();
    sums[threadIdx.x] += previous;
    __syncthreads();
  }
  uint32_t above = sums[threadIdx.x] - thread_count;
  if (above < prefix.from_top && prefix.from_top <= sums[threadIdx.x]) {
    int bin = top;
    while (prefix.from_top - above > shared.bins[bin]) above += shared.bins[bin--];
    shared.result = {prefix.first_bits << kBinBits | bin, prefix.from_top - above};
  }
  __syncthreads();
  return shared.result;
}

// Calls take(value) for the magnitudes of a sample that belong to block number `block` of `blocks`. A thread issues
// several loads before it uses the first one, since its block may be the only one on the multiprocessor. A sample has
// fewer than 2^31 magnitudes.
template <class Take>
__device__ __forceinline__ void for_each_magnitude(const uint32_t* magnitudes, uint32_t numel, uint32_t block,
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

// Counts the histogram of the kBinBits bits from bit `shift` on, over the magnitudes that begin with the prefix's bits.
// Also computes shared.larger, the smallest of the magnitudes whose first bits are larger: it may be the second of the
// two between which the quantile is interpolated. Reads the magnitudes that belong to block number `block` of `blocks`.
__device__ __forceinline__ void count_bits(const XStartScaleCall& call, int64_t b, uint32_t block, uint32_t blocks,
                                           const Prefix& prefix, int shift, Shared& shared) {
  clear(shared);
  uint32_t larger = kMagnitude;
  for_each_magnitude(magnitudes_of(call, b), static_cast<uint32_t>(call.numel), block, blocks, [&](uint32_t value) {
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

// Adds the block's histogram to the sample's histogram in `counts`, which is zero before and after a launch. Returns
// whether the block is the last of the sample's blocks to do this. If so, shared.bins is then the sample's histogram.
__device__ __forceinline__ bool has_counts_of_all(Shared& shared, uint32_t* counts, int64_t batch, int64_t b) {
  if (gridDim.x == 1) return true;
  uint32_t* const sample_counts = counts + batch + b * kBins;
  for (int i = threadIdx.x; i < kBins; i += kThreads)
    if (shared.bins[i] != 0) atomicAdd(sample_counts + i, shared.bins[i]);
  if (!comes_last(counts + b, gridDim.x, shared.last)) return false;
  for (int i = threadIdx.x; i < kBins; i += kThreads)
    shared.bins[i] = read_of_other_block(sample_counts + i), sample_counts[i] = 0;
  __syncthreads();
  return true;
}

// Stores a sample's factor, from the histogram of the last bits. All threads of the block call this together.
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

// If a sample has at most this number of blocks, the last block counts the second and the third histogram in the same
// launch. Up to this number of blocks, that takes no more time than two further launches.
constexpr unsigned kBlocksOfOneLaunch = 4;

// Computes the magnitudes and the first histogram of all samples, and also their factors if a sample has at most
// kBlocksOfOneLaunch blocks. `counts` is zero before and after the launch. It has a counter for each sample, which
// counts its finished blocks. If a sample has several blocks, the samples' histograms follow, with kBins bins each.
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
  const bool nan = shared.bins[kBins - 1] != 0;  // if a magnitude is NaN, so is the quantile: then rank 1 is wanted
  Prefix prefix = narrow_down({0, nan ? 1 : static_cast<uint32_t>(call.rank.from_top)}, shared);
  if (gridDim.x > kBlocksOfOneLaunch) {
    if (threadIdx.x == 0) *search_of(call, b) = {prefix, kMagnitude};
    return;
  }
#pragma unroll 1  // the unrolled loop would take more registers
  for (int shift = kBinBits;; shift = 0) {
    count_bits(call, b, 0, 1, prefix, shift, shared);
    if (shift == 0) return finish(call, b, prefix, shared);
    prefix = narrow_down(prefix, shared);
  }
}

// Counts the second histogram (shift = kBinBits), or the third one (shift = 0) and stores the factors. Runs after
// threshold_samples, if a sample has more than kBlocksOfOneLaunch blocks.
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
    if (threadIdx.x == 0) shared.larger = read_of_other_block(&search->larger);
    return finish(call, b, prefix, shared);
  }
  const Prefix next = narrow_down(prefix, shared);
  if (threadIdx.x == 0) search->prefix = next;
}

// A sample has at most one block for each kElementsOfBlock elements, rounded up. With more blocks, adding their
// histograms to the sample's histogram would take too much time.
constexpr int64_t kElementsOfBlock = 8192;

template <Access kAccess, class X, class M>
void launch(const XStartScaleCall& call, int device, cudaStream_t stream) {
  constexpr auto kKernel = threshold_samples<kAccess, X, M>;
  const int64_t most = divide_up(call.numel, kElementsOfBlock);
  const Shape shape = shape_of_samples(call.batch, most, kThreads, room_for<kKernel>(kThreads).blocks);
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
