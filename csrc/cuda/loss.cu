// The training loss: the loss of every element (core/loss.h), its slopes, and the sums of each sample and of the batch,
// in one launch.
#include "core/loss.h"

#include <type_traits>

#include "cuda/access.cuh"
#include "cuda/launch.cuh"
#include "cuda/memory.cuh"
#include "cuda/normals.cuh"
#include "cuda/operators.h"
#include "cuda/pixels.cuh"
#include "cuda/sample.cuh"
#include "cuda/sums.cuh"

namespace ddpm_ext::cuda {
namespace {

// The offsets of one element in the tensors of a call.
struct ElementOffsets {
  int64_t model_output, variance, x_start, noise, slope, variance_slope;
};

// Loads and stores four neighbouring elements of sample b, from element j on. Elements beyond the sample's end are
// loaded as zeros and not stored.
template <Access kAccess>
class Four {
 public:
  using Index = IndexOf<kAccess>;

  __device__ __forceinline__ Four(const LossCall& call, const Dividers& dividers, Index b, Index j) : b_(b), j_(j) {
    const Index numel = static_cast<Index>(call.numel);
    count_ = j >= numel ? 0 : numel - j < 4 ? static_cast<int>(numel - j) : 4;
    if constexpr (kAccess == Access::strided) {
      DDPM_UNROLL
      for (int i = 0; i < 4; ++i) {
        ElementOffsets& p = offsets_[i];
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
        if (!has(i)) continue;
        for_each_index(call, dividers, j + i,
                       [&](int d, int64_t n) { add(n, [d](const TensorArg& tensor) { return tensor.strides[d]; }); });
      }
    }
  }

  // Whether element j + i is an element of the sample.
  __device__ __forceinline__ bool has(int i) const { return i < count_; }

  // Loads the elements of a tensor into `to`. If `given` is false, loads nothing, and the caller must not use `to`.
  // `member` names the tensor's offset in ElementOffsets.
  template <class T>
  __device__ __forceinline__ void load(bool given, const TensorArg& tensor, int64_t ElementOffsets::* member,
                                       Vector<T, 4>& to) const {
    const T* const data = static_cast<const T*>(tensor.data);
    const bool whole = kAccess == Access::vector && count_ == 4;
    if (!whole) {
      T values[4];
      DDPM_UNROLL
      for (int i = 0; i < 4; ++i) values[i] = given && has(i) ? data[offset(tensor, member, i)] : from_float<T>(0.0f);
      memcpy(to.pairs, values, sizeof values);
    }
    if constexpr (kAccess == Access::vector) to.load_if(whole && given, data + offset(tensor, member, 0));
  }

  __device__ __forceinline__ void store(const TensorArg& tensor, int64_t ElementOffsets::* member,
                                        const F2 (&from)[2]) const {
    float* const data = static_cast<float*>(tensor.data);
    if (kAccess == Access::vector && count_ == 4) {
      Vector<float, 4> vector;
      narrow(from[0], vector.pairs[0]);
      narrow(from[1], vector.pairs[1]);
      return vector.store(in_register(data + offset(tensor, member, 0)));
    }
    const float values[4] = {from[0].v.x, from[0].v.y, from[1].v.x, from[1].v.y};
    DDPM_UNROLL
    for (int i = 0; i < 4; ++i)
      if (has(i)) data[offset(tensor, member, i)] = values[i];
  }

 private:
  __device__ __forceinline__ int64_t offset(const TensorArg& tensor, int64_t ElementOffsets::* member, int i) const {
    if constexpr (kAccess == Access::vector) return sample_start(tensor.batch_stride, b_) + j_ + i;
    return offsets_[i].*member;
  }

  const Index b_, j_;
  int count_;
  ElementOffsets offsets_[kAccess == Access::strided ? 4 : 1];
};

// Returns decoder_bound of core/loss.h for two elements, computed one after the other.
__device__ __forceinline__ LossAndSlopes<F2> decoder_bound(const VariationalRow& row, F2 d, F2 v, F2 x_start) {
  const LossAndSlopes<float> a = ddpm_ext::decoder_bound(row, d.v.x, v.v.x, x_start.v.x);
  const LossAndSlopes<float> b = ddpm_ext::decoder_bound(row, d.v.y, v.v.y, x_start.v.y);
  return {F2(a.value, b.value), F2(a.slope, b.slope), F2(a.variance_slope, b.variance_slope)};
}

// Calls take(kind) with the kind as a compile-time constant, so that the compiler makes separate code for each kind.
template <class Take>
__device__ __forceinline__ void by_kind(Loss kind, Take take) {
  if (kind == Loss::mse) return take(std::integral_constant<Loss, Loss::mse>());
  if (kind == Loss::l1) return take(std::integral_constant<Loss, Loss::l1>());
  take(std::integral_constant<Loss, Loss::huber>());
}

// The most channels of a call that is reordered by by_pixels: shared memory holds a chunk's losses for each channel.
constexpr int kMostChannels = 8;

// The work of a thread for one sample. In a turn (one loop iteration) a block processes kParts chunks, and a thread
// processes four elements of each of these chunks. With kHostKeys, the host knows the seed, so the kernel uses the
// Philox keys that the host has computed.
template <class Row, Noise kNoise, Access kAccess, bool kHostKeys, class X, class M>
class LossOfSample {
 public:
  using Index = IndexOf<kAccess>;
  static constexpr bool kVariational = std::is_same_v<Row, VariationalRow>;
  static constexpr int kParts = kAccess == Access::vector ? 2 : 1;
  // Whether by_pixels may have reordered the call. Calls with the variational bound are not reordered: in most of them
  // the model returns the variance as further channels, so the channels of model_output alone are not contiguous for a
  // pixel.
  static constexpr bool kPixels = kAccess == Access::strided && kNoise == Noise::drawn && !kVariational;
  // The least number of blocks that a multiprocessor can hold, which limits the registers of a thread.
  static constexpr int kBlocks = kAccess == Access::strided ? 1 : kVariational ? 6 : 8;

  __device__ __forceinline__ LossOfSample(const LossCall& call, const Dividers& dividers, const PhiloxKeys& keys,
                                          Index b, int64_t t)
      : call_(call), dividers_(dividers), keys_(keys), b_(b), row_(static_cast<const Row*>(call.table)[t]) {
    if constexpr (kNoise == Noise::drawn) counter_ = sample_noise(call, keys, b, static_cast<uint32_t>(t));
    factor_ = F2(slope_factor(call.slope_share, call.kind, row_));
    reads_x_start_ = aims_at_x_start_ = call.x_start.data != nullptr;
    if constexpr (kVariational) reads_x_start_ = reads_x_start(row_), aims_at_x_start_ = row_.k0 != 0.0f;
  }

  // Loads the inputs of the thread's elements of a turn.
  __device__ __forceinline__ void load(Index turn) {
    DDPM_UNROLL
    for (int p = 0; p < kParts; ++p) load(four_of(turn, p), p);
  }

  // Computes the losses of the elements that `load` has loaded, and stores their slopes.
  __device__ __forceinline__ void take(Index turn, float (&losses)[kParts][kLossChunk]) {
    F2 z[kParts][2] = {};
    if (kNoise == Noise::drawn && row_.k1 != 0.0f) {
      DDPM_UNROLL
      for (int p = 0; p < kParts; ++p) draw_normals(keys_, counter_, element(turn, p), z[p]);
      keep_uses_behind(z[kParts - 1][1].v.y);
    }
    DDPM_UNROLL
    for (int p = 0; p < kParts; ++p) {
      const Four<kAccess> four = four_of(turn, p);
      F2 values[2];
      take(four, p, z[p], values);
      float* const slots = losses[p] + 4 * threadIdx.x;
      slots[0] = four.has(0) ? values[0].v.x : 0.0f, slots[1] = four.has(1) ? values[0].v.y : 0.0f;
      slots[2] = four.has(2) ? values[1].v.x : 0.0f, slots[3] = four.has(3) ? values[1].v.y : 0.0f;
    }
  }

  // Processes a stretch of pixels of a call that by_pixels has reordered. A stretch has as many pixels as a chunk has
  // elements. So losses[channel] becomes that channel's chunk, with the elements in the order of a contiguous sample.
  // Stores the slopes.
  __device__ __forceinline__ void pixels(uint32_t stretch, float (&losses)[kMostChannels][kParts][kLossChunk]) {
    constexpr uint32_t kQuads = kLossChunk / 4, kWarps = kLossThreads / kLanes;
    const PixelWords<kLossThreads> words(call_, dividers_, threadIdx.x / kLanes, kWarps, stretch * kQuads,
                                         (stretch + 1) * kQuads);
#pragma unroll 1
    for (uint32_t quad = words.first; quad < words.end; quad += words.step) {
      const bool has = words.has(quad);
      const Four<Access::vector> four(call_, dividers_, static_cast<uint32_t>(b_),
                                      has ? words.element(quad) : static_cast<uint32_t>(call_.numel));
      load(four, 0);
      F2 z[2] = {}, values[2];
      if (row_.k1 != 0.0f) words.draw_normals(keys_, counter_, quad, z);
      if (!has) continue;
      take(four, 0, z, values);
      const float losses_of_word[4] = {values[0].v.x, values[0].v.y, values[1].v.x, values[1].v.y};
      words.for_each_element(dividers_, quad, [&](uint32_t channel, uint32_t pixel, uint32_t i) {
        losses[channel][0][pixel % kLossChunk] = losses_of_word[i];
      });
    }
  }

  __device__ __forceinline__ float weight() const { return weight_of_sum(row_); }

 private:
  template <class Elements>
  __device__ __forceinline__ void load(const Elements& four, int p) {
    four.load(true, call_.model_output, &ElementOffsets::model_output, m_[p]);
    four.load(reads_x_start_, call_.x_start, &ElementOffsets::x_start, x_start_[p]);
    if constexpr (kNoise == Noise::given) four.load(true, call_.noise, &ElementOffsets::noise, z_[p]);
    if constexpr (kVariational)
      four.load(call_.variance.data != nullptr, call_.variance, &ElementOffsets::variance, v_[p]);
  }

  // Computes the losses (`values`) of the four elements that are loaded in part p, and stores their slopes. If noise is
  // drawn, z is the noise.
  template <class Elements>
  __device__ __forceinline__ void take(const Elements& four, int p, F2 (&z)[2], F2 (&values)[2]) {
    m_[p].unpack_from_here(), x_start_[p].unpack_from_here(), v_[p].unpack_from_here();
    F2 slopes[2], variance_slopes[2], difference[2];
    DDPM_UNROLL
    for (int i = 0; i < 2; ++i) {
      if constexpr (kNoise == Noise::given) z[i] = widen(z_[p].pairs[i]);
      const F2 x_start = reads_x_start_ ? widen(x_start_[p].pairs[i]) : F2(0.0f);
      difference[i] = loss_difference(row_, widen(m_[p].pairs[i]), aims_at_x_start_, x_start, z[i]);
      if constexpr (kVariational) {
        const F2 d = difference[i], v = call_.variance.data != nullptr ? widen(v_[p].pairs[i]) : F2(0.0f);
        const LossAndSlopes<F2> parts =
            with_bound(row_, call_.kind, call_.delta, call_.detached, d,
                       row_.decoder != 0.0f ? decoder_bound(row_, d, v, x_start) : divergence(row_, d, v));
        values[i] = parts.value;
        slopes[i] = factor_ * parts.slope;
        variance_slopes[i] = factor_ * parts.variance_slope;
      }
    }
    if constexpr (!kVariational) {
      by_kind(call_.kind, [&](auto kind) {
        constexpr Loss kKind = decltype(kind)::value;
        DDPM_UNROLL
        for (int i = 0; i < 2; ++i) {
          const F2 s = unscaled_slope(kKind, call_.delta, difference[i]);
          values[i] = loss_value(kKind, difference[i], s);
          slopes[i] = factor_ * s;
        }
      });
    }
    if (call_.slope.data != nullptr) four.store(call_.slope, &ElementOffsets::slope, slopes);
    if constexpr (kVariational) {
      if (call_.variance_slope.data != nullptr)
        four.store(call_.variance_slope, &ElementOffsets::variance_slope, variance_slopes);
    }
  }

  static __device__ __forceinline__ Index element(Index turn, int p) {
    return (turn * kParts + p) * kLossChunk + 4 * threadIdx.x;
  }
  __device__ __forceinline__ Four<kAccess> four_of(Index turn, int p) const {
    return Four<kAccess>(call_, dividers_, b_, element(turn, p));
  }

  const LossCall& call_;
  const Dividers& dividers_;
  const PhiloxKeys& keys_;
  const Index b_;
  const Row row_;
  PhiloxSample counter_{};
  F2 factor_;
  bool reads_x_start_, aims_at_x_start_;
  Vector<M, 4> m_[kParts], v_[kParts];
  Vector<X, 4> x_start_[kParts], z_[kParts];
};

// Computes the losses of all samples, the slopes, and the sum of the losses. `counts` has batch + 1 counters, which are
// zero before and after the launch: one for each sample, which counts its finished blocks, and one for the finished
// samples.
//
// With Access::strided, a sample has stretches of `apart` turns: one stretch for each channel if channels_in_turn is
// more than 1, otherwise a single stretch. A block begins with turn blockIdx.x of the first stretch and takes the same
// turn of the other stretches. Then it goes on in the first stretch, gridDim.x turns later. So a block processes all
// channels of some pixels before it takes other pixels. In channels_last tensors, the L1 cache then still holds the
// other channels. For a call that by_pixels has reordered, `apart` is the number of its stretches of pixels.
template <class Row, Noise kNoise, Access kAccess, bool kHostKeys, class X, class M>
__global__ void __launch_bounds__(kLossThreads, LossOfSample<Row, kNoise, kAccess, kHostKeys, X, M>::kBlocks)
    loss_of_samples(const __grid_constant__ LossCall call, const __grid_constant__ Dividers dividers,
                    const __grid_constant__ PhiloxKeys host_keys, const int64_t apart, uint32_t* counts) {
  using Body = LossOfSample<Row, kNoise, kAccess, kHostKeys, X, M>;
  using Index = typename Body::Index;
  constexpr int kParts = Body::kParts;
  // The losses of this turn and of the previous turn. For a call that by_pixels has reordered, the losses of each
  // channel in a stretch.
  __shared__ float losses[Body::kPixels ? kMostChannels : 2][kParts][kLossChunk];
  __shared__ double strands[kLossStrands];
  __shared__ bool last;
  const Index b = sample_of_block<Index>();
  if (b >= static_cast<Index>(call.batch)) return;
  PhiloxKeys keys;
  if constexpr (kNoise == Noise::drawn && !kHostKeys)
    keys = philox_keys(call.seed_data != nullptr ? static_cast<uint64_t>(*call.seed_data) : call.seed);
  Body body(call, dividers, kHostKeys ? host_keys : keys, b, sample_row(call, b));

  const Index chunks = static_cast<Index>(loss_chunks(call.numel)), turns = (chunks + kParts - 1) / kParts;
  double* const sums = call.chunks + static_cast<int64_t>(b) * chunks;
  if constexpr (Body::kPixels) {
    const uint32_t channels = static_cast<uint32_t>(call.channels_last), stretches = static_cast<uint32_t>(apart);
    for (uint32_t stretch = blockIdx.x; channels > 0 && stretch < stretches; stretch += gridDim.x) {
      __syncthreads();  // waits until no thread reads the losses of the previous stretch
      body.pixels(stretch, losses);
      __syncthreads();
      for (uint32_t c = threadIdx.x / kLanes; c < channels; c += kLossThreads / kLanes) {
        const double sum = sum_of_lanes(losses[c][0]);
        if (threadIdx.x % kLanes == 0) sums[c * stretches + stretch] = sum;
      }
    }
  }
  Index first = call.channels_last > 0 ? turns : blockIdx.x;  // the block's turn in the first stretch
  const auto next = [&](Index turn) {
    if constexpr (kAccess == Access::vector) return turn + gridDim.x;
    turn += apart;
    if (turn < turns) return turn;
    first += gridDim.x;
    return first < apart ? first : turns;
  };
  body.load(first);
  unsigned odd = 0;
#pragma unroll 1
  for (Index turn = first, after; turn < turns; turn = after, odd ^= 1) {
    after = next(turn);
    body.take(turn, losses[odd]);
    body.load(after);  // before the sums, so that these loads overlap with the sums
    __syncthreads();
    // One warp adds up a chunk, and in odd turns it is another warp than in even turns. Meanwhile the other warps begin
    // the next turn, which writes to the other half of `losses`. The turn after that writes to this half, but between
    // the two turns there is another barrier.
    const unsigned part = (threadIdx.x / 32 + 2 * odd) % (kLossThreads / 32);
    const Index chunk = turn * kParts + part;
    if (part < kParts && chunk < chunks) {
      const double sum = sum_of_lanes(losses[odd][part]);
      if (threadIdx.x % 32 == 0) sums[chunk] = sum;
    }
  }

  if (!comes_last(counts + b, gridDim.x, last)) return;
  const double sum = sum_by_strands(chunks, [&](int64_t i) { return read_of_other_block(sums + i); }, strands);
  if (threadIdx.x == 0) call.loss[b] = static_cast<float>(sum * call.per_element * static_cast<double>(body.weight()));
  if (call.total == nullptr || !comes_last(counts + call.batch, static_cast<uint32_t>(call.batch), last)) return;
  const double total =
      sum_by_strands(call.batch, [&](int64_t i) { return read_of_other_block(call.loss + i); }, strands);
  if (threadIdx.x == 0) *call.total = static_cast<float>(total * call.total_factor);
}

// Returns how many channels a block processes for its pixels, one after the other: all or one. It is all if by_pixels
// has reordered the call. It is also all if a sample has two dimensions and at most kMaxChannelsInTurn channels, each
// channel consists of whole chunks, and the chunks of one channel, over all samples, give the device enough blocks
// (`at_once`). The reason for all channels is that of channels_in_turn in access.cuh.
int64_t channels_in_turn(const LossCall& call, int64_t at_once) {
  if (call.channels_last > 0) return call.channels_last;
  const bool separate = call.dims == 2 && call.sizes[0] <= kMaxChannelsInTurn && call.sizes[1] % kLossChunk == 0;
  return separate && call.batch * (call.sizes[1] / kLossChunk) >= at_once ? call.sizes[0] : 1;
}

template <class Row, Noise kNoise, Access kAccess, bool kHostKeys, class X, class M>
void launch_access(const LossCall& call, int device, cudaStream_t stream) {
  constexpr auto kKernel = loss_of_samples<Row, kNoise, kAccess, kHostKeys, X, M>;
  constexpr int kParts = LossOfSample<Row, kNoise, kAccess, kHostKeys, X, M>::kParts;
  const int64_t at_once = room_for<kKernel>(kLossThreads).blocks, turns = divide_up(loss_chunks(call.numel), kParts),
                apart = turns / (kAccess == Access::strided ? channels_in_turn(call, at_once) : 1);
  const Shape shape = shape_of_samples(call.batch, apart, kLossThreads, at_once);
  const Counts counts(call.batch + 1, device, stream);
  launch_on<kKernel>(shape, stream, call, Dividers(call), philox_keys(call.seed), apart, counts.data());
}

template <class Row, Noise kNoise, class X, class M>
void launch_noise_kind(const LossCall& call, int device, cudaStream_t stream) {
  if (choose_access(call) == Access::strided) {
    const bool pixels = std::is_same_v<Row, LossRow> && call.dims == 2 && call.sizes[0] <= kMostChannels &&
                        call.sizes[1] % kLossChunk == 0;
    const LossCall& reordered = pixels ? by_pixels(call) : call;
    return launch_access<Row, kNoise, Access::strided, false, X, M>(reordered, device, stream);
  }
  // With kHostKeys there is a second kernel. To limit the number of kernels, only the most frequent calls with drawn
  // noise have one: those without the variational bound, with Access::vector.
  if constexpr (kNoise == Noise::drawn && std::is_same_v<Row, LossRow>) {
    if (call.seed_data == nullptr) return launch_access<Row, kNoise, Access::vector, true, X, M>(call, device, stream);
  }
  launch_access<Row, kNoise, Access::vector, false, X, M>(call, device, stream);
}

template <class Row, class X, class M>
void launch_row(const LossCall& call, int device, cudaStream_t stream) {
  if (call.noise_kind == Noise::drawn) return launch_noise_kind<Row, Noise::drawn, X, M>(call, device, stream);
  launch_noise_kind<Row, Noise::given, X, M>(call, device, stream);
}

template <class X, class M>
void launch(const LossCall& call, int device, cudaStream_t stream) {
  if (call.variational) return launch_row<VariationalRow, X, M>(call, device, stream);
  launch_row<LossRow, X, M>(call, device, stream);
}

}  // namespace

void loss(const LossCall& call, int device) {
  on_device(device, [&](cudaStream_t stream) {
    by_dtypes(call.x_start.dtype, call.model_output.dtype,
              [&](auto x, auto m) { launch<decltype(x), decltype(m)>(call, device, stream); });
  });
}

}  // namespace ddpm_ext::cuda
