// Cuts a batch into runs for the kernels: spreads them over threads, looks up each sample's row and counter, and brings
// tails and strided memory through a buffer, so that the kernels see whole vectors in logical order and nothing else.
#include "cpu/loops.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <array>
#include <tuple>
#include <type_traits>

namespace ddpm_ext::cpu {
namespace {

constexpr int64_t kBuffer = 512;  // elements; a multiple of kRunMultiple, and kLossChunk

int64_t element_size(DType dtype) { return dtype == DType::float32 ? 4 : 2; }

// Walks the logical order of a sample, keeping the offset of one strided tensor.
class StridedWalk {
 public:
  StridedWalk(const Call& args, const TensorArg& tensor, int64_t start) : args_(args), tensor_(tensor) {
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

  const Call& args_;
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

// A tensor, and where a run wants to know of it.
struct Part {
  const TensorArg* tensor;
  void** place;
  bool written;
};

std::array<Part, 4> parts_of(const Args& args, Run& run) {
  return {{{&args.x, &run.x, false},
           {&args.model_output, &run.model_output, false},
           {&args.noise, &run.noise, false},
           {&args.out, &run.out, true}}};
}

std::array<Part, kRoles + kResults> parts_of(const ExtendedArgs& args, ExtendedRun& run) {
  std::array<Part, kRoles + kResults> parts;
  for (int i = 0; i < kRoles; ++i) parts[i] = {&args.inputs[i], &run.inputs[i], false};
  for (int i = 0; i < kResults; ++i) parts[kRoles + i] = {&args.results[i], &run.results[i], true};
  return parts;
}

std::array<Part, 6> parts_of(const LossArgs& args, LossRun& run) {
  return {{{&args.model_output, &run.model_output, false},
           {&args.variance, &run.variance, false},
           {&args.x_start, &run.x_start, false},
           {&args.noise, &run.noise, false},
           {&args.slope, &run.slope, true},
           {&args.variance_slope, &run.variance_slope, true}}};
}

// Elements j to j + n of a sample into the buffer, zeros behind them up to a whole run.
void load(const Call& args, const Part& part, const char* sample, int64_t j, int64_t n, int64_t padded, char* buffer) {
  const int64_t size = element_size(part.tensor->dtype);
  const StridedWalk walk(args, *part.tensor, j);
  if (size == 4) {
    gather(walk, reinterpret_cast<const float*>(sample), reinterpret_cast<float*>(buffer), n);
  } else {
    gather(walk, reinterpret_cast<const uint16_t*>(sample), reinterpret_cast<uint16_t*>(buffer), n);
  }
  memset(buffer + n * size, 0, (padded - n) * size);
}

void store(const Call& args, const Part& part, char* sample, int64_t j, int64_t n, const char* buffer) {
  const StridedWalk walk(args, *part.tensor, j);
  if (element_size(part.tensor->dtype) == 4) {
    scatter(walk, reinterpret_cast<const float*>(buffer), reinterpret_cast<float*>(sample), n);
  } else {
    scatter(walk, reinterpret_cast<const uint16_t*>(buffer), reinterpret_cast<uint16_t*>(sample), n);
  }
}

// What a run of n elements from the sample's j on has to know beside where its tensors are; and of how many elements a
// run that reads them where they lie is a multiple.
void begin_run(const Run&, int64_t, int64_t) {}
void begin_run(const ExtendedRun&, int64_t, int64_t) {}
void begin_run(LossRun& run, int64_t j, int64_t n) {
  run.valid = n;
  run.chunks = run.sample_chunks + j / kLossChunk;
}
template <class Run>
constexpr int64_t kMultiple = std::is_same_v<Run, LossRun> ? kLossChunk : kRunMultiple;

// Elements first to last of one sample.
template <class Args, class Run>
void run_sample(void (*kernel)(const Run&), const Args& args, Run run, int64_t b, int64_t first, int64_t last) {
  const auto parts = parts_of(args, run);
  constexpr size_t kParts = std::tuple_size_v<decltype(parts_of(args, run))>;
  char* samples[kParts];
  for (size_t p = 0; p < kParts; ++p) {
    const TensorArg& tensor = *parts[p].tensor;
    *parts[p].place = nullptr;
    samples[p] = tensor.data == nullptr
                     ? nullptr
                     : static_cast<char*>(tensor.data) + b * tensor.batch_stride * element_size(tensor.dtype);
  }
  const int64_t direct = args.contiguous ? first + (last - first) / kMultiple<Run> * kMultiple<Run> : first;
  if (direct > first) {
    for (size_t p = 0; p < kParts; ++p)
      if (samples[p] != nullptr) *parts[p].place = samples[p] + first * element_size(parts[p].tensor->dtype);
    run.count = direct - first;
    run.block = static_cast<uint32_t>(first / 4);
    begin_run(run, first, run.count);
    kernel(run);
  }
  if (direct == last) return;
  alignas(64) char buffers[kParts][kBuffer * 4];
  for (int64_t j = direct; j < last; j += kBuffer) {
    const int64_t n = std::min(kBuffer, last - j), padded = (n + kRunMultiple - 1) / kRunMultiple * kRunMultiple;
    for (size_t p = 0; p < kParts; ++p) {
      if (samples[p] == nullptr) continue;
      if (!parts[p].written) load(args, parts[p], samples[p], j, n, padded, buffers[p]);
      *parts[p].place = buffers[p];
    }
    run.count = padded;
    run.block = static_cast<uint32_t>(j / 4);
    begin_run(run, j, n);
    kernel(run);
    for (size_t p = 0; p < kParts; ++p)
      if (parts[p].written && samples[p] != nullptr) store(args, parts[p], samples[p], j, n, buffers[p]);
  }
}

struct NoRow {};

// Checked already; clamped, since another thread may have written to t since.
int64_t timestep(const Call& args, int64_t b) {
  const int64_t t = args.t != nullptr ? args.t[b * args.t_stride] : args.t_index;
  return std::clamp<int64_t>(t, 0, args.rows - 1);
}

// choose(row): the kernel for a sample. draw_of(row, b): the draw where the caller gave none. fill(run, b): what else
// the sample's run has to say.
template <class Row, class Run, class Args, class Choose, class DrawOf, class Fill>
void for_each_sample(const Args& args, Choose choose, DrawOf draw_of, Fill fill) {
  const uint64_t seed = args.seed_data != nullptr ? static_cast<uint64_t>(*args.seed_data) : args.seed;
  const PhiloxKeys keys = philox_keys(seed);
  const Row* table = static_cast<const Row*>(args.table);

  auto range = [&](int64_t b, int64_t first, int64_t last) {
    Run run{};
    run.keys = &keys;
    const Row* row = nullptr;
    if (table != nullptr) row = table + timestep(args, b);
    run.row = row;
    const int64_t id = args.sample_ids != nullptr ? args.sample_ids[b * args.ids_stride] : args.first_id + b;
    const uint32_t draw = args.draw >= 0 ? static_cast<uint32_t>(args.draw) : draw_of(row, b);
    run.counter = philox_sample(keys, sample_counter(static_cast<uint64_t>(id), args.stream, draw));
    fill(run, b);
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
  const auto clip = [&](Run& run, int64_t) { run.clip_min = args.clip_min, run.clip_max = args.clip_max; };
  const int x = index(args.x.dtype), m = index(args.model_output.dtype);
  auto choose = [&](const StepRow* row) {
    const bool noiseless = args.noise_kind == Noise::drawn && row->s == 0.0f;  // no noise worth drawing
    return table[static_cast<int>(noiseless ? Noise::none : args.noise_kind)][x][m];
  };
  for_each_sample<StepRow, Run>(args, choose, [](const StepRow* row, int64_t) { return row->draw; }, clip);
}

void extended_step(const ExtendedArgs& args) {
  const auto& table = kernels().extended_step;
  const int x = index(args[Role::x].dtype), m = index(args[Role::model_output].dtype);
  const bool masked = args[Role::mask].data != nullptr;
  auto choose = [&](const ExtendedRow* row) {
    return table[args.noise_kind == Noise::drawn && draws(*row, masked)][x][m];
  };
  auto fill = [&](ExtendedRun& run, int64_t b) {
    const auto of = [b](const PerSample& values) {
      return values.data == nullptr ? 1.0f : values.data[b * values.stride];
    };
    run.sample = {args.clip_min, args.clip_max, of(args.output_scale), of(args.x_start_scale), args.variance_kind};
  };
  for_each_sample<ExtendedRow, ExtendedRun>(
      args, choose, [](const ExtendedRow* row, int64_t) { return row->step.draw; }, fill);
}

void affine(const Args& args) {
  const int x = index(args.x.dtype), z = args.noise_kind == Noise::given ? index(args.noise.dtype) : x;
  const RunKernel kernel = kernels().affine[static_cast<int>(args.noise_kind)][x][z];
  for_each_sample<AffineRow, Run>(
      args, [=](const AffineRow*) { return kernel; },
      [&](const AffineRow*, int64_t b) { return static_cast<uint32_t>(timestep(args, b)); }, [](Run&, int64_t) {});
}

void randn(const Args& args) {
  const RunKernel kernel = kernels().randn[index(args.out.dtype)];
  for_each_sample<NoRow, Run>(
      args, [=](const NoRow*) { return kernel; }, [](const NoRow*, int64_t) { return 0u; }, [](Run&, int64_t) {});
}

namespace {

// In the order of kLossStrands.
template <class T>
double sum_by_strands(const T* values, int64_t count) {
  double strands[kLossStrands] = {};
  for (int64_t i = 0; i < count; ++i) strands[i % kLossStrands] += values[i];
  for (int h = kLossStrands / 2; h > 0; h /= 2)
    for (int i = 0; i < h; ++i) strands[i] += strands[i + h];
  return strands[0];
}

template <class Row>
void loss_by_rows(const LossArgs& args, const LossRunKernel (&table)[3][3][3]) {
  const int x = index(args.x_start.dtype), m = index(args.model_output.dtype);
  auto choose = [&](const Row* row) {
    const bool noiseless = args.noise_kind == Noise::drawn && row->k1 == 0.0f;  // no noise worth drawing
    return table[static_cast<int>(noiseless ? Noise::none : args.noise_kind)][x][m];
  };
  const int64_t chunks = loss_chunks(args.numel);
  auto fill = [&](LossRun& run, int64_t b) {
    run.kind = args.kind;
    run.delta = args.delta;
    run.detached = args.detached;
    run.slope_share = args.slope_share;
    run.sample_chunks = args.chunks + b * chunks;
  };
  for_each_sample<Row, LossRun>(
      args, choose, [&](const Row*, int64_t b) { return static_cast<uint32_t>(timestep(args, b)); }, fill);
  for (int64_t b = 0; b < args.batch; ++b) {
    const double weight = weight_of_sum(static_cast<const Row*>(args.table)[timestep(args, b)]);
    args.loss[b] = static_cast<float>(sum_by_strands(args.chunks + b * chunks, chunks) * args.per_element * weight);
  }
  if (args.total != nullptr)
    *args.total = static_cast<float>(sum_by_strands(args.loss, args.batch) * args.total_factor);
}

}  // namespace

void loss(const LossArgs& args) {
  if (args.variational) return loss_by_rows<VariationalRow>(args, kernels().variational_loss);
  loss_by_rows<LossRow>(args, kernels().loss);
}

}  // namespace ddpm_ext::cpu
