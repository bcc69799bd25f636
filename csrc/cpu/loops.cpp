// Cuts a batch into runs for the kernels: spreads them over threads, looks up each sample's row and counter, and brings
// tails and strided memory through a buffer, so that the kernels see whole vectors in logical order and nothing else.
#include "cpu/loops.h"

#include <ATen/Parallel.h>

#include <algorithm>

namespace ddpm_ext::cpu {
namespace {

constexpr int64_t kBuffer = 512;  // elements; a multiple of kRunMultiple

int64_t element_size(DType dtype) { return dtype == DType::float32 ? 4 : 2; }

// Walks the logical order of a sample, keeping the offset of one strided tensor.
class StridedWalk {
 public:
  StridedWalk(const Args& args, const TensorArg& tensor, int64_t start) : args_(args), tensor_(tensor) {
    for (int d = args.dims - 1; d >= 0; --d) {
      index_[d] = start % args.sizes[d];
      start /= args.sizes[d];
      offset_ += index_[d] * tensor.strides[d];
    }
  }

  // Calls copy(offset, stride, count) for pieces along the last dimension, n elements in all.
  template <class Copy>
  void walk(int64_t n, Copy copy) {
    const int last = args_.dims - 1;
    while (n > 0) {
      const int64_t count = std::min(n, args_.sizes[last] - index_[last]);
      copy(offset_, tensor_.strides[last], count);
      n -= count;
      advance(last, count);
      for (int d = last; d > 0 && index_[d] == args_.sizes[d]; --d) {
        offset_ -= index_[d] * tensor_.strides[d];
        index_[d] = 0;
        advance(d - 1, 1);
      }
    }
  }

 private:
  void advance(int d, int64_t n) {
    index_[d] += n;
    offset_ += n * tensor_.strides[d];
  }

  const Args& args_;
  const TensorArg& tensor_;
  int64_t index_[kMaxDims] = {};
  int64_t offset_ = 0;
};

template <class T>
void gather(StridedWalk walk, const T* from, T* to, int64_t n) {
  walk.walk(n, [&](int64_t offset, int64_t stride, int64_t count) {
    for (int64_t i = 0; i < count; ++i) *to++ = from[offset + i * stride];
  });
}

template <class T>
void scatter(StridedWalk walk, const T* from, T* to, int64_t n) {
  walk.walk(n, [&](int64_t offset, int64_t stride, int64_t count) {
    for (int64_t i = 0; i < count; ++i) to[offset + i * stride] = *from++;
  });
}

// One tensor's part of one sample.
struct Source {
  const Args& args;
  const TensorArg& tensor;
  char* sample;
  alignas(64) char buffer[kBuffer * 4];

  Source(const Args& args, const TensorArg& tensor, int64_t b)
      : args(args),
        tensor(tensor),
        sample(tensor.data == nullptr
                   ? nullptr
                   : static_cast<char*>(tensor.data) + b * tensor.batch_stride * element_size(tensor.dtype)) {}

  char* at(int64_t j) const { return sample == nullptr ? nullptr : sample + j * element_size(tensor.dtype); }

  // Elements j to j + n into the buffer, zeros behind them up to a whole run.
  const char* load(int64_t j, int64_t n, int64_t padded) {
    if (sample == nullptr) return nullptr;
    const StridedWalk walk(args, tensor, j);
    if (tensor.dtype == DType::float32) {
      gather(walk, reinterpret_cast<const float*>(sample), reinterpret_cast<float*>(buffer), n);
    } else {
      gather(walk, reinterpret_cast<const uint16_t*>(sample), reinterpret_cast<uint16_t*>(buffer), n);
    }
    memset(buffer + n * element_size(tensor.dtype), 0, (padded - n) * element_size(tensor.dtype));
    return buffer;
  }

  void store(int64_t j, int64_t n) {
    const StridedWalk walk(args, tensor, j);
    if (tensor.dtype == DType::float32) {
      scatter(walk, reinterpret_cast<const float*>(buffer), reinterpret_cast<float*>(sample), n);
    } else {
      scatter(walk, reinterpret_cast<const uint16_t*>(buffer), reinterpret_cast<uint16_t*>(sample), n);
    }
  }
};

// Elements first to last of one sample.
void run_sample(RunKernel kernel, const Args& args, Run run, int64_t b, int64_t first, int64_t last) {
  Source x(args, args.x, b), model_output(args, args.model_output, b), noise(args, args.noise, b),
      out(args, args.out, b);
  const int64_t direct = args.contiguous ? first + (last - first) / kRunMultiple * kRunMultiple : first;
  run.block = static_cast<uint32_t>(first / 4);
  if (direct > first) {
    run.x = x.at(first);
    run.model_output = model_output.at(first);
    run.noise = noise.at(first);
    run.out = out.at(first);
    run.count = direct - first;
    kernel(run);
  }
  for (int64_t j = direct; j < last; j += kBuffer) {
    const int64_t n = std::min(kBuffer, last - j), padded = (n + kRunMultiple - 1) / kRunMultiple * kRunMultiple;
    run.x = x.load(j, n, padded);
    run.model_output = model_output.load(j, n, padded);
    run.noise = noise.load(j, n, padded);
    run.out = out.buffer;
    run.count = padded;
    run.block = static_cast<uint32_t>(j / 4);
    kernel(run);
    out.store(j, n);
  }
}

struct NoRow {};

// Checked already; clamped, since another thread may have written to t since.
int64_t timestep(const Args& args, int64_t b) {
  const int64_t t = args.t != nullptr ? args.t[b * args.t_stride] : args.t_index;
  return std::clamp<int64_t>(t, 0, args.rows - 1);
}

// choose(row): the kernel for a sample. draw_of(row, b): the draw where the caller gave none.
template <class Row, class Choose, class DrawOf>
void for_each_sample(const Args& args, Choose choose, DrawOf draw_of) {
  const uint64_t seed = args.seed_data != nullptr ? static_cast<uint64_t>(*args.seed_data) : args.seed;
  const PhiloxKeys keys = philox_keys(seed);
  const Row* table = static_cast<const Row*>(args.table);

  auto range = [&](int64_t b, int64_t first, int64_t last) {
    Run run{};
    run.clip_min = args.clip_min;
    run.clip_max = args.clip_max;
    run.keys = &keys;
    const Row* row = nullptr;
    if (table != nullptr) row = table + timestep(args, b);
    run.row = row;
    const int64_t id = args.sample_ids != nullptr ? args.sample_ids[b * args.ids_stride] : args.first_id + b;
    const uint32_t draw = args.draw >= 0 ? static_cast<uint32_t>(args.draw) : draw_of(row, b);
    run.counter = philox_sample(keys, sample_counter(static_cast<uint64_t>(id), args.stream, draw));
    run_sample(choose(row), args, run, b, first, last);
  };

  // Threads share the batch as one sequence of chunks, so that one large sample is spread as well as many small ones.
  constexpr int64_t kChunk = kBuffer;
  const int64_t per_sample = (args.numel + kChunk - 1) / kChunk;
  const int64_t grain = std::max<int64_t>(1, 8192 / std::min(kChunk, args.numel));
  at::parallel_for(0, args.batch * per_sample, grain, [&](int64_t begin, int64_t end) {
    for (int64_t chunk = begin; chunk < end;) {
      const int64_t b = chunk / per_sample, from = chunk % per_sample;
      const int64_t to = std::min(per_sample, from + (end - chunk));
      range(b, from * kChunk, std::min(to * kChunk, args.numel));
      chunk += to - from;
    }
  });
}

int index(DType dtype) { return static_cast<int>(dtype); }

}  // namespace

void reverse_step(const Args& args) {
  const auto& table = kernels().reverse_step;
  const int x = index(args.x.dtype), m = index(args.model_output.dtype);
  auto choose = [&](const StepRow* row) {
    const bool noiseless = args.noise_kind == Noise::drawn && row->s == 0.0f;  // no noise worth drawing
    return table[static_cast<int>(noiseless ? Noise::none : args.noise_kind)][x][m];
  };
  for_each_sample<StepRow>(args, choose, [](const StepRow* row, int64_t) { return row->draw; });
}

void affine(const Args& args) {
  const int x = index(args.x.dtype), z = args.noise_kind == Noise::given ? index(args.noise.dtype) : x;
  const RunKernel kernel = kernels().affine[static_cast<int>(args.noise_kind)][x][z];
  for_each_sample<AffineRow>(
      args, [=](const AffineRow*) { return kernel; },
      [&](const AffineRow*, int64_t b) { return static_cast<uint32_t>(timestep(args, b)); });
}

void randn(const Args& args) {
  const RunKernel kernel = kernels().randn[index(args.out.dtype)];
  for_each_sample<NoRow>(args, [=](const NoRow*) { return kernel; }, [](const NoRow*, int64_t) { return 0u; });
}

}  // namespace ddpm_ext::cpu
