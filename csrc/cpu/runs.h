// Cuts a batch into runs for the kernels: spreads the samples over threads, finds each sample's row and Philox counter,
// and copies the ends of samples and strided memory through a buffer, so that the kernels only see whole vectors in
// logical order.
#pragma once

#include <algorithm>
#include <array>
#include <tuple>
#include <type_traits>

#include "cpu/kernel_table.h"
#include "cpu/parallel.h"
#include "cpu/strided_copy.h"

namespace ddpm_ext::cpu {

constexpr int64_t kBuffer = 512;  // elements; a multiple of kRunMultiple and of kLossChunk
// A run through a buffer is one chunk at most, so a chunk that is not whole stands alone (kernels/spread.h).
static_assert(kBuffer == kLossChunk);

// A tensor of a call, and the field of a run that points into it.
struct Part {
  const TensorArg* tensor;
  void** place;
  bool written;
};

inline std::array<Part, 4> parts_of(const ElementwiseCall& call, Run& run) {
  return {{{&call.x, &run.x, false},
           {&call.model_output, &run.model_output, false},
           {&call.noise, &run.noise, call.noise_kind == Noise::drawn},
           {&call.out, &run.out, true}}};
}

inline std::array<Part, kRoles + kResults + 1> parts_of(const StepCall& call, StepRun& run) {
  std::array<Part, kRoles + kResults + 1> parts;
  for (int i = 0; i < kRoles; ++i) parts[i] = {&call.inputs[i], &run.inputs[i], false};
  for (int i = 0; i < kResults; ++i) parts[kRoles + i] = {&call.results[i], &run.results[i], true};
  parts[kRoles + kResults] = {&call.input_again, &run.input_again, true};
  return parts;
}

inline std::array<Part, 6> parts_of(const LossCall& call, LossRun& run) {
  return {{{&call.model_output, &run.model_output, false},
           {&call.variance, &run.variance, false},
           {&call.x_start, &run.x_start, false},
           {&call.noise, &run.noise, false},
           {&call.slope, &run.slope, true},
           {&call.variance_slope, &run.variance_slope, true}}};
}

inline std::array<Part, 3> parts_of(const XStartScaleCall& call, MagnitudesRun& run) {
  return {{{&call.x, &run.x, false},
           {&call.model_output, &run.model_output, false},
           {&call.uncond_output, &run.uncond_output, false}}};
}

inline std::array<Part, 2> parts_of(const OutputScaleCall& call, MomentsRun& run) {
  return {{{&call.model_output, &run.model_output, false}, {&call.uncond_output, &run.uncond_output, false}}};
}

// Sets the fields of a run, besides its tensors, that depend on its place: it has n elements from element j on.
template <class Run>
void begin_run(Run& run, int64_t j, int64_t) {
  run.block = static_cast<uint32_t>(j / 4);
}
inline void begin_run(LossRun& run, int64_t j, int64_t n) {
  run.block = static_cast<uint32_t>(j / 4);
  run.valid = n;
  run.chunks = run.sample_chunks + j / kLossChunk;
}
inline void begin_run(MagnitudesRun& run, int64_t j, int64_t) { run.magnitudes = run.sample_magnitudes + j; }
inline void begin_run(MomentsRun& run, int64_t j, int64_t n) {
  run.valid = n;
  run.chunks = run.sample_chunks + 2 * (j / kLossChunk);
}

// A run that reads its tensors without a buffer has a multiple of this many elements.
template <class Run>
constexpr int64_t kMultiple =
    std::is_same_v<Run, LossRun> || std::is_same_v<Run, MomentsRun> ? kLossChunk : kRunMultiple;

// Runs a kernel over elements `first` to `last` of sample b: directly where the tensors are contiguous, and through a
// buffer for strided memory and for the elements that do not fill a whole run.
template <class AnyCall, class Run>
void run_sample(void (*kernel)(const Run&), const AnyCall& call, Run run, int64_t b, int64_t first, int64_t last) {
  const auto parts = parts_of(call, run);
  constexpr size_t kParts = std::tuple_size_v<decltype(parts_of(call, run))>;
  char* samples[kParts];
  for (size_t p = 0; p < kParts; ++p) {
    const TensorArg& tensor = *parts[p].tensor;
    *parts[p].place = nullptr;
    samples[p] = tensor.data == nullptr
                     ? nullptr
                     : static_cast<char*>(tensor.data) + b * tensor.batch_stride * element_size(tensor.dtype);
  }
  const int64_t direct = call.contiguous ? first + (last - first) / kMultiple<Run> * kMultiple<Run> : first;
  if (direct > first) {
    for (size_t p = 0; p < kParts; ++p)
      if (samples[p] != nullptr) *parts[p].place = samples[p] + first * element_size(parts[p].tensor->dtype);
    run.count = direct - first;
    begin_run(run, first, run.count);
    kernel(run);
  }
  if (direct == last) return;
  alignas(64) char buffers[kParts][kBuffer * 4];
  for (int64_t j = direct; j < last; j += kBuffer) {
    const int64_t n = std::min(kBuffer, last - j), padded = (n + kRunMultiple - 1) / kRunMultiple * kRunMultiple;
    for (size_t p = 0; p < kParts; ++p) {
      if (samples[p] == nullptr) continue;
      if (!parts[p].written) load(call, *parts[p].tensor, samples[p], j, n, padded, buffers[p]);
      *parts[p].place = buffers[p];
    }
    run.count = padded;
    begin_run(run, j, n);
    kernel(run);
    for (size_t p = 0; p < kParts; ++p)
      if (parts[p].written && samples[p] != nullptr) store(call, *parts[p].tensor, samples[p], j, n, buffers[p]);
  }
}

// The row of sample b. t has been checked; the clamp protects against another thread that writes to it meanwhile.
inline int64_t timestep(const Call& call, int64_t b) {
  const int64_t t = call.t != nullptr ? call.t[b * call.t_stride] : call.t_index;
  return std::clamp<int64_t>(t, 0, call.rows - 1);
}

// Calls range(b, first, last) for elements `first` to `last` of sample b, until all elements of all samples have had
// their turn. Threads divide the whole batch as one sequence of chunks, so that one large sample is spread as well as
// many small ones are.
template <class Range>
void for_each_range(const Call& call, Range range) {
  constexpr int64_t kChunk = kBuffer;
  const int64_t per_sample = (call.numel + kChunk - 1) / kChunk;
  const int64_t grain = std::max<int64_t>(1, 8192 / std::min(kChunk, call.numel));
  parallel_for(call.batch * per_sample, grain, [&](int64_t begin, int64_t end) {
    for (int64_t chunk = begin; chunk < end;) {
      const int64_t b = chunk / per_sample, from = chunk % per_sample;
      const int64_t to = std::min(per_sample, from + (end - chunk));
      range(b, from * kChunk, std::min(to * kChunk, call.numel));
      chunk += to - from;
    }
  });
}

// The draw to use for row t if the caller gave none.
template <class Row>
uint32_t draw_of(const Row*, int64_t t) {
  return static_cast<uint32_t>(t);
}
inline uint32_t draw_of(const StepRow* row, int64_t) { return row->draw; }

// Runs kernels over all samples of a call. choose(row) returns the kernel of a sample, and fill(run, b) sets the
// remaining fields of a sample's run.
template <class Row, class Run, class AnyCall, class Choose, class Fill>
void for_each_sample(const AnyCall& call, Choose choose, Fill fill) {
  const uint64_t seed = call.seed_data != nullptr ? static_cast<uint64_t>(*call.seed_data) : call.seed;
  const PhiloxKeys keys = philox_keys(seed);
  const Row* table = static_cast<const Row*>(call.table);

  for_each_range(call, [&](int64_t b, int64_t first, int64_t last) {
    Run run{};
    run.keys = &keys;
    const int64_t t = table == nullptr ? 0 : timestep(call, b);
    const Row* row = table + t;
    run.row = row;
    const int64_t id = call.sample_ids != nullptr ? call.sample_ids[b * call.ids_stride] : call.first_id + b;
    const uint32_t draw = call.draw >= 0 ? static_cast<uint32_t>(call.draw) : draw_of(row, t);
    run.counter = philox_sample(keys, sample_counter(static_cast<uint64_t>(id), call.stream, draw));
    fill(run, b);
    run_sample(choose(row), call, run, b, first, last);
  });
}

}  // namespace ddpm_ext::cpu
