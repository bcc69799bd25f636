// One kernel template for the reverse step, the affine operators and randn. In a turn (one loop iteration) a thread
// processes kParts runs. A run is four or eight neighbouring elements: one or two whole Philox blocks, whatever the
// launch's shape. The runs of neighbouring threads are neighbours in the sample. So with Access::vector a warp accesses
// contiguous memory. A block has the dimensions (elements, samples), and the grid (elements, samples, further samples).
#pragma once

#include "cuda/access.cuh"
#include "cuda/launch.cuh"
#include "cuda/memory.cuh"
#include "cuda/normals.cuh"
#include "cuda/pixels.cuh"
#include "cuda/sample.cuh"

namespace ddpm_ext::cuda {

// The work of a thread for one sample. Op is an operator with these members:
//   Call                      the type of its calls: ElementwiseCall or derived from it
//   Row                       the row of its table; kRowless says that it has none
//   kX, kSecond               whether it reads x, and whether it reads `model_output`
//   kDraws                    whether every row needs the drawn noise; if not, draws(row) says whether this row does
//   draw(row, t)              the `draw` of the noise's counter, if the caller has not passed one
//   mean(row, call, x, m)     the result without noise
//   noisy(row, mean, x, z)    the result with the noise z, from the result without noise
template <class Op, Noise kNoise, bool kDeviceSeed, Access kAccess, class X, class M, class Z>
class Elementwise {
 public:
  using Call = typename Op::Call;
  using Index = IndexOf<kAccess>;
  static constexpr bool kWide =
      sizeof(X) == 4 || (Op::kSecond && sizeof(M) == 4) || (kNoise == Noise::given && sizeof(Z) == 4);
  static constexpr bool kNarrow =
      sizeof(X) == 2 || (Op::kSecond && sizeof(M) == 2) || (kNoise == Noise::given && sizeof(Z) == 2);
  // kWide, kNarrow: whether a tensor of the call is float32, and whether one has 16 bits. With Access::vector and no
  // float32 tensors, a run is eight elements, 128 bits of each tensor. Otherwise it is four elements: 128 bits of a
  // float32 tensor, and 64 bits of a 16-bit tensor. If such a run of Access::vector has 16-bit tensors or drawn noise,
  // a turn has two runs, which share the turn's other instructions.
  static constexpr int kRun = kAccess == Access::vector && !kWide ? 8 : 4;
  static constexpr int kParts = kAccess == Access::vector && kWide && (kNarrow || kNoise == Noise::drawn) ? 2 : 1;
  static constexpr int kItems = kParts * kRun;
  // Whether by_pixels may have reordered the call. Calls of randn are not reordered: their result is contiguous.
  static constexpr bool kPixels = kAccess == Access::strided && kNoise == Noise::drawn && Op::kX;
  // The least number of blocks that a multiprocessor can hold. 4 limits a thread to 64 registers, and 3 to 80. Strided
  // offsets need more registers, and so do Philox keys that the thread computes from a seed in device memory.
  static constexpr int kBlocks = kAccess == Access::strided || kDeviceSeed ? 3 : 4;

  __device__ __forceinline__ Elementwise(const Call& call, const Dividers& dividers, const PhiloxKeys& keys, Index b)
      : call_(call),
        dividers_(dividers),
        keys_(keys),
        b_(b),
        x_(static_cast<const X*>(call.x.data) + sample_start(call.x.batch_stride, b)),
        m_(static_cast<const M*>(call.model_output.data) + sample_start(call.model_output.batch_stride, b)),
        noise_(static_cast<const Z*>(call.noise.data) + sample_start(call.noise.batch_stride, b)),
        out_(static_cast<X*>(call.out.data) + sample_start(call.out.batch_stride, b)) {}

  // Processes all of the thread's elements of the sample.
  __device__ __forceinline__ void run() {
    const Index step = static_cast<Index>(gridDim.x) * blockDim.x * kItems;
    const Index first = (static_cast<Index>(blockIdx.x) * kParts * blockDim.x + threadIdx.x) * kRun;
    if constexpr (kAccess == Access::vector) {
      x_ = in_register(x_), m_ = in_register(m_), noise_ = in_register(noise_), out_ = in_register(out_);
      const Index whole = static_cast<Index>(call_.numel) / kRun * kRun;
      Inputs inputs;
      // The first turn's inputs are loaded before the row: the row may take two loads of which the second waits for the
      // first, t[b] and table[t].
      DDPM_UNROLL
      for (int p = 0; p < kParts; ++p) load(inputs, p, first + p * run_stride(), whole);
      read_row();
      vectors(inputs, first, step, whole);
    } else {
      read_row();
      if constexpr (kPixels)
        if (call_.channels_last > 0) return pixels();
      elements(first, step);
    }
  }

 private:
  using Row = typename Op::Row;

  struct Inputs {
    Vector<X, kRun> x[kParts];
    Vector<M, kRun> m[kParts];
    Vector<Z, kRun> noise[kParts];
  };

  // Reads what all elements of the sample share: the row, and the sample's part of the Philox counter.
  __device__ __forceinline__ void read_row() {
    const int64_t t = sample_row(call_, b_);
    if constexpr (!Op::kRowless) row_ = cuda::read_row<Row>(call_, t);
    if constexpr (kNoise == Noise::drawn) {
      counter_ = sample_noise(call_, keys_, b_, Op::draw(row_, t));
      // Without make_opaque, the compiler would move the computation of these numbers into the loop over turns.
      make_opaque(counter_.c3_key), make_opaque(counter_.c0_high);
      make_opaque(counter_.c1_key), make_opaque(counter_.c3);
    }
  }

  // Whether the kernel adds noise in this row. It always adds noise from the caller. If noise is drawn, a row that
  // needs none adds nothing, not even zero, as on the CPU: -0 plus 0 is 0.
  __device__ __forceinline__ bool noisy() const {
    if constexpr (kNoise == Noise::drawn && !Op::kDraws) return Op::draws(row_);
    return kNoise != Noise::none;
  }

  // The distance between a thread's runs within a turn, in elements.
  static __device__ __forceinline__ Index run_stride() { return blockDim.x * kRun; }

  __device__ __forceinline__ void load(Inputs& inputs, int p, Index j, Index whole) const {
    const bool inside = j < whole;
    if constexpr (Op::kX) inputs.x[p].load_if(inside, x_ + j);
    if constexpr (Op::kSecond) inputs.m[p].load_if(inside, m_ + j);
    if constexpr (kNoise == Noise::given) inputs.noise[p].load_if(inside, noise_ + j);
  }

  // Takes the turns whose first runs begin at j, j + step, and so on up to `whole`, the end of the sample's last whole
  // run. `inputs` has the loaded inputs of the first turn. A turn draws its noise before it uses its inputs, and then
  // loads the inputs of the next turn. So loads are in flight while noise is drawn, even in a launch of a single turn.
  __device__ __forceinline__ void vectors(Inputs& inputs, Index j, Index step, Index whole) const {
    const bool noisy = this->noisy();
    // A branch around the noise keeps the compiler from moving the next turn's loads behind the noise, to where their
    // values are used. If every row needs noise, `noisy` is the constant true and makes no branch. So then the branch
    // tests noise_kind, which is `drawn` in every call, but the compiler does not know that.
    const bool draws = Op::kX && Op::kDraws ? call_.noise_kind == Noise::drawn : noisy;
    if (j < whole) {
#pragma unroll 1
      do {
        F2 z[kParts][kRun / 2];
        if (kNoise == Noise::drawn && draws) {
          DDPM_UNROLL
          for (int p = 0; p < kParts; ++p) {
            DDPM_UNROLL
            for (int i = 0; i < kRun / 2; i += 2) draw_normals(keys_, counter_, j + p * run_stride() + 2 * i, z[p] + i);
          }
          if constexpr (Op::kX) keep_uses_behind(z[kParts - 1][kRun / 2 - 1].v.y);
        }
        DDPM_UNROLL
        for (int p = 0; p < kParts; ++p) {
          Vector<X, kRun> stored;
          DDPM_UNROLL
          for (int i = 0; i < kRun / 2; ++i) {
            F2 x = {}, m = {};
            if constexpr (Op::kX) x = widen(inputs.x[p].pairs[i]);
            if constexpr (Op::kSecond) m = widen(inputs.m[p].pairs[i]);
            if constexpr (kNoise == Noise::given) z[p][i] = widen(inputs.noise[p].pairs[i]);
            F2 out = Op::mean(row_, call_, x, m);
            if (noisy) out = Op::noisy(row_, out, x, z[p][i]);
            narrow(out, stored.pairs[i]);
          }
          if (p == 0 || j + p * run_stride() < whole) stored.store(out_ + j + p * run_stride());
          load(inputs, p, j + step + p * run_stride(), whole);
        }
        j += step;
      } while (j < whole);
    }
    // One thread processes the elements after the sample's last whole run: the thread whose next run would begin there.
    const Index second = j - step + run_stride();  // where the second run of the last turn begins
    if (j != whole && (kParts == 1 || second != whole)) return;
#pragma unroll 1
    for (Index e = whole; e < static_cast<Index>(call_.numel); ++e) {
      F2 z[2] = {};
      if (kNoise == Noise::drawn && noisy) draw_normals(keys_, counter_, e, z);
      element({e, e, e, e}, noisy, one_of_four(z, e));
    }
  }

  // Returns the noise of element i mod 4 of a Philox block, whose four normals are in the pairs z[0] and z[1].
  template <class Number>
  static __device__ __forceinline__ float one_of_four(const F2* z, Number i) {
    const F2 half = i & 2 ? z[1] : z[0];
    return i & 1 ? half.v.y : half.v.x;
  }

  // Processes a sample of a call that by_pixels has reordered, by words of four elements (cuda/pixels.cuh).
  __device__ __forceinline__ void pixels() const {
    const bool noisy = this->noisy();
    const PixelWords words(call_, dividers_);
#pragma unroll 1
    for (uint32_t quad = words.first; quad < words.end; quad += words.step) {
      const uint32_t j = words.element(quad);
      const bool has = words.has(quad);
      Inputs inputs;
      load(inputs, 0, j, has ? call_.numel : 0);
      F2 z[2] = {};
      if (noisy) words.draw_normals(keys_, counter_, quad, z);
      if (has) four(inputs, noisy, z).store(out_ + j);
    }
  }

  // Processes the four elements at `first`, first + step, and so on, with any strides. If channels_in_turn says more
  // than 1, these are pixels of the first channel, and the thread also processes the same pixels of the other channels.
  __device__ __forceinline__ void elements(Index first, Index step) const {
    const bool noisy = this->noisy();
    const Index channels = channels_in_turn(call_), pixels = channels == 1 ? call_.numel : call_.sizes[1];
#pragma unroll 1
    for (Index pixel = first; pixel < pixels; pixel += step) {
#pragma unroll 1
      for (Index j = pixel; j < call_.numel; j += pixels) {
        F2 z[2] = {};
        if (kNoise == Noise::drawn && noisy) draw_normals(keys_, counter_, j, z);
        if (in_row(call_, dividers_, j, 4)) {
          row_of_four(offsets(call_, dividers_, j), noisy, z);
          continue;
        }
#pragma unroll 1
        for (int i = 0; i < 4 && j + i < call_.numel; ++i)
          element(offsets(call_, dividers_, j + i), noisy, one_of_four(z, i));
      }
    }
  }

  // Processes four elements that are neighbours along the last dimension, and loads all four before it stores the
  // first. The compiler could not move loads before stores, since a store may change the memory that a later load
  // reads.
  __device__ __forceinline__ void row_of_four(const Offsets& o, bool noisy, F2* z) const {
    const int d = call_.dims - 1;
    Inputs inputs;
    if constexpr (Op::kX) inputs.x[0].gather(x_ + o.x, call_.x.strides[d]);
    if constexpr (Op::kSecond) inputs.m[0].gather(m_ + o.model_output, call_.model_output.strides[d]);
    if constexpr (kNoise == Noise::given) inputs.noise[0].gather(noise_ + o.noise, call_.noise.strides[d]);
    four(inputs, noisy, z).scatter(out_ + o.out, call_.out.strides[d]);
  }

  // Computes the results of four elements from their loaded inputs. If noise is drawn, z is their noise.
  __device__ __forceinline__ Vector<X, 4> four(const Inputs& inputs, bool noisy, F2* z) const {
    Vector<X, 4> results;
    DDPM_UNROLL
    for (int i = 0; i < 2; ++i) {
      F2 x = {}, m = {};
      if constexpr (Op::kX) x = widen(inputs.x[0].pairs[i]);
      if constexpr (Op::kSecond) m = widen(inputs.m[0].pairs[i]);
      if constexpr (kNoise == Noise::given) z[i] = widen(inputs.noise[0].pairs[i]);
      F2 out = Op::mean(row_, call_, x, m);
      if (noisy) out = Op::noisy(row_, out, x, z[i]);
      narrow(out, results.pairs[i]);
    }
    return results;
  }

  // Processes one element, which has the offsets o. If noise is drawn, z is its noise.
  __device__ __forceinline__ void element(const Offsets& o, bool noisy, float z) const {
    const float x = Op::kX ? to_float(x_[o.x]) : 0.0f;
    const float m = Op::kSecond ? to_float(m_[o.model_output]) : 0.0f;
    if constexpr (kNoise == Noise::given) z = to_float(noise_[o.noise]);
    float out = Op::mean(row_, call_, x, m);
    if (noisy) out = Op::noisy(row_, out, x, z);
    out_[o.out] = from_float<X>(out);
  }

  const Call& call_;
  const Dividers& dividers_;
  const PhiloxKeys& keys_;
  const Index b_;
  const X* x_;
  const M* m_;
  const Z* noise_;
  X* out_;
  Row row_{};
  PhiloxSample counter_{};
};

template <class Op, Noise kNoise, bool kDeviceSeed, Access kAccess, class X, class M, class Z>
__global__ void __launch_bounds__(kThreads, Elementwise<Op, kNoise, kDeviceSeed, kAccess, X, M, Z>::kBlocks)
    elementwise(const __grid_constant__ typename Op::Call call, const __grid_constant__ Dividers dividers,
                const __grid_constant__ PhiloxKeys host_keys) {
  using Body = Elementwise<Op, kNoise, kDeviceSeed, kAccess, X, M, Z>;
  using Index = typename Body::Index;
  const Index b = static_cast<Index>(blockIdx.z * gridDim.y + blockIdx.y) * blockDim.y + threadIdx.y;
  if (b >= static_cast<Index>(call.batch)) return;
  PhiloxKeys keys;
  if constexpr (kDeviceSeed) keys = philox_keys(static_cast<uint64_t>(*call.seed_data));
  Body(call, dividers, kDeviceSeed ? keys : host_keys, b).run();
}

template <class Op, Noise kNoise, bool kDeviceSeed, Access kAccess, class X, class M, class Z>
void launch_access(const typename Op::Call& call, cudaStream_t stream) {
  constexpr auto kKernel = elementwise<Op, kNoise, kDeviceSeed, kAccess, X, M, Z>;
  constexpr int kItems = Elementwise<Op, kNoise, kDeviceSeed, kAccess, X, M, Z>::kItems;
  const Room room = room_for<kKernel>(kThreads);
  const Shape shape = launch_shape(call.batch, elements_of_threads(call), kItems, room.multiprocessors, room.blocks);
  launch_on<kKernel>(shape, stream, call, Dividers(call), philox_keys(call.seed));
}

template <class Op, Noise kNoise, bool kDeviceSeed, class X, class M, class Z>
void launch_typed(const typename Op::Call& call, cudaStream_t stream) {
  if (choose_access(call) == Access::vector)
    launch_access<Op, kNoise, kDeviceSeed, Access::vector, X, M, Z>(call, stream);
  else
    launch_access<Op, kNoise, kDeviceSeed, Access::strided, X, M, Z>(by_pixels(call), stream);
}

// Launches the kernel for the call's kind of noise. X is the type of x and out, M the type of model_output, and Z the
// type of the caller's noise.
template <class Op, class X, class M, class Z>
void launch_noise(const typename Op::Call& call, cudaStream_t stream) {
  switch (call.noise_kind) {
    case Noise::none:
      return launch_typed<Op, Noise::none, false, X, M, Z>(call, stream);
    case Noise::given:
      return launch_typed<Op, Noise::given, false, X, M, Z>(call, stream);
    case Noise::drawn:
      if (call.seed_data != nullptr) return launch_typed<Op, Noise::drawn, true, X, M, Z>(call, stream);
      return launch_typed<Op, Noise::drawn, false, X, M, Z>(call, stream);
  }
}

}  // namespace ddpm_ext::cuda
