// Divides the elements of a call into runs. A run is neighbouring elements of one sample, in the order of the call's
// sizes, and one call of a kernel processes it. The samples are divided among threads, and each run gets its sample's
// row and Philox counter. A run at the end of a sample, or in strided memory, goes through a buffer. So a kernel
// processes whole, contiguous vectors.
#pragma once

#include <algorithm>
#include <array>
#include <tuple>
#include <type_traits>
#include <vector>

#include "cpu/kernel_table.h"
#include "cpu/noise_by_pixels.h"
#include "cpu/parallel.h"
#include "cpu/strided_copy.h"

namespace ddpm_ext::cpu {

constexpr int64_t kRow = 512;  // the usual number of columns of a Tile: a multiple of kRunMultiple and of kLossChunk
// For the kernels that sum over chunks, a run through a buffer is at most one chunk. So an incomplete chunk is always
// the only chunk of its run, as kernels/spread.h requires.
static_assert(kRow == kLossChunk);
constexpr int64_t kBuffer = 32 * kRow;  // the most elements of a Tile

// A tensor of a call, the field of a run that points to the tensor's elements, and whether the kernel writes them.
struct TensorField {
  const TensorArg* tensor;
  void** pointer;
  bool written;
};

// Returns the TensorFields of a call. There is an overload for each type of call.
inline std::array<TensorField, 4> tensors_of(const ElementwiseCall& call, Run& run) {
  return {{{&call.x, &run.x, false},
           {&call.model_output, &run.model_output, false},
           {&call.noise, &run.noise, call.noise_kind == Noise::drawn},
           {&call.out, &run.out, true}}};
}

inline std::array<TensorField, kRoles + kResults + 1> tensors_of(const StepCall& call, StepRun& run) {
  std::array<TensorField, kRoles + kResults + 1> fields;
  for (int i = 0; i < kRoles; ++i) fields[i] = {&call.inputs[i], &run.inputs[i], false};
  for (int i = 0; i < kResults; ++i) fields[kRoles + i] = {&call.results[i], &run.results[i], true};
  fields[kRoles + kResults] = {&call.input_again, &run.input_again, true};
  return fields;
}

inline std::array<TensorField, 6> tensors_of(const LossCall& call, LossRun& run) {
  return {{{&call.model_output, &run.model_output, false},
           {&call.variance, &run.variance, false},
           {&call.x_start, &run.x_start, false},
           {&call.noise, &run.noise, false},
           {&call.slope, &run.slope, true},
           {&call.variance_slope, &run.variance_slope, true}}};
}

inline std::array<TensorField, 3> tensors_of(const XStartScaleCall& call, MagnitudesRun& run) {
  return {{{&call.x, &run.x, false},
           {&call.model_output, &run.model_output, false},
           {&call.uncond_output, &run.uncond_output, false}}};
}

inline std::array<TensorField, 2> tensors_of(const OutputScaleCall& call, MomentsRun& run) {
  return {{{&call.model_output, &run.model_output, false}, {&call.uncond_output, &run.uncond_output, false}}};
}

// Sets the fields of a run that depend on its position, but not the pointers to its tensors. The run has n elements,
// from element j of the sample on.
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

// A run that accesses its tensors without a buffer has a multiple of this number of elements.
template <class Run>
constexpr int64_t kMultiple =
    std::is_same_v<Run, LossRun> || std::is_same_v<Run, MomentsRun> ? kLossChunk : kRunMultiple;

// The size of the matrix of a sample's elements that a buffer holds. A kernel processes one row of it after the other.
struct Tile {
  int64_t rows, columns;
};

// Chooses the tile of a call. In a strided sample of two dimensions, the channels are the dimension with at most
// kBuffer / kUnit elements, the last dimension if both have:
// - If the sample is (channels, pixels), the rows are the channels. Usually some tensors are channels_last. The tile
//   has all channels of its pixels, so its elements are neighbours in channels_last tensors, too. This requires at
//   least kUnit pixels, and whole chunks or Philox blocks in a channel if the kernel sums or draws noise.
// - If the sample is (pixels, channels), the tile is one row with all channels of its pixels.
// - For all other samples, and for kernels that sum over (pixels, channels), the tile is one row of kRow elements.
template <class Run>
Tile tile_of(const Call& call) {
  constexpr int64_t kUnit = kMultiple<Run>;
  constexpr bool kChunks = kUnit == kLossChunk;
  const Tile chunk = {1, kRow};
  if (call.channels_last > 0) return {1, copied_at_once(call.channels_last)};
  if (call.contiguous || call.dims != 2) return chunk;
  const int64_t rows = call.sizes[0], columns = call.sizes[1];
  const int64_t pixels = std::min(kRow, kBuffer / (kUnit * columns) * kUnit);
  if (!kChunks && pixels > 0) return {1, pixels * columns};
  const int64_t whole = kChunks ? kLossChunk : call.noise_kind == Noise::drawn ? 4 : 1;  // 4 is a Philox block
  if (rows > kBuffer / kUnit || columns < kUnit || columns % whole != 0) return chunk;
  return {rows, std::min(kRow, kBuffer / rows / kUnit * kUnit)};
}

// The buffers of a thread, one for each tensor of a call. `stride` is the distance between buffers in bytes.
struct Buffers {
  char* first;
  size_t stride;
};
// Returns `count` buffers for a tile. The thread uses the same memory in later calls. The memory is not on the stack,
// where buffers for 16 channels would not fit.
inline Buffers buffers_of(Tile tile, size_t count) {
  struct alignas(64) Line {
    char bytes[64];
  };
  static thread_local std::vector<Line> memory;
  const size_t lines = tile.rows * ((tile.columns + kRunMultiple - 1) / kRunMultiple * kRunMultiple) * 4 / sizeof(Line);
  if (memory.size() < count * lines) memory.resize(count * lines);
  return {memory.data()->bytes, lines * sizeof(Line)};
}

// Returns a call of two dimensions, (channels, pixels), with its dimensions in the order (pixels, channels).
template <class Run, class AnyCall>
AnyCall by_pixels(AnyCall call) {
  call.channels_last = call.sizes[0];
  std::swap(call.sizes[0], call.sizes[1]);
  Run run{};
  call.contiguous = true;
  for (const TensorField& field : tensors_of(call, run)) {
    TensorArg& tensor = const_cast<TensorArg&>(*field.tensor);
    if (tensor.data == nullptr) continue;
    std::swap(tensor.strides[0], tensor.strides[1]);
    call.contiguous = call.contiguous && tensor.strides[1] == 1 && tensor.strides[0] == call.channels_last;
  }
  return call;
}

// Whether the samples of a tensor are contiguous in memory, in the order of the call's sizes.
inline bool in_order(const Call& call, const TensorArg& tensor) {
  int64_t stride = 1;
  for (int d = call.dims - 1; d >= 0; stride *= call.sizes[d--])
    if (tensor.strides[d] != stride) return false;
  return true;
}

// Runs a kernel over elements `first` to `last` - 1 of each of the tile.rows rows of sample b. The kernel accesses a
// contiguous tensor directly. A tensor in another order is copied through a buffer, and so are elements that do not
// fill a whole run.
template <class AnyCall, class Run>
void run_sample(void (*kernel)(const Run&), const AnyCall& call, Run run, int64_t b, int64_t first, int64_t last,
                Tile tile = {1, kRow}) {
  const auto fields = tensors_of(call, run);
  // A tensor that the call has, and its memory.
  struct UsedTensor {
    const TensorArg* tensor;
    void** pointer;
    bool written, ordered;  // ordered: in_order
    char *sample, *buffer;
    int64_t size;        // of an element, in bytes
    char* row;           // the current row of the tile, in the sample or in the buffer
    int64_t row_stride;  // from one row of the tile to the next, in bytes
  } used[std::tuple_size_v<decltype(tensors_of(call, run))>], *end = used;
  for (const TensorField& field : fields) {
    const TensorArg& tensor = *field.tensor;
    *field.pointer = nullptr;
    if (tensor.data == nullptr) continue;
    const int64_t size = element_size(tensor.dtype);
    char* const sample = static_cast<char*>(tensor.data) + b * tensor.batch_stride * size;
    *end++ = {&tensor, field.pointer, field.written, in_order(call, tensor), sample, nullptr, size, nullptr, 0};
  }
  const int64_t group = call.channels_last > 0 ? whole_groups(call.channels_last) : 0;
  const int64_t multiple = group > 0 ? group : kMultiple<Run>, padding = group > 0 ? group : kRunMultiple;
  const int64_t direct_end = call.contiguous ? first + (last - first) / multiple * multiple : first;
  if (direct_end > first) {
    for (UsedTensor* t = used; t < end; ++t) *t->pointer = t->sample + first * t->size;
    run.count = direct_end - first;
    begin_run(run, first, run.count);
    kernel(run);
  }
  if (direct_end == last) return;
  const Buffers buffers = buffers_of(tile, end - used);
  for (UsedTensor* t = used; t < end; ++t) t->buffer = buffers.first + (t - used) * buffers.stride;
  const int64_t in_row = call.numel / tile.rows;
  for (int64_t j = direct_end; j < last; j += tile.columns) {
    const int64_t n = std::min(tile.columns, last - j), padded = (n + padding - 1) / padding * padding;
    const Stretch stretch = {tile.rows, j, n, padded};
    const auto is_copied = [&](const UsedTensor* t) { return n < padded || !t->ordered; };
    for (UsedTensor* t = used; t < end; ++t) {
      if (is_copied(t)) {
        if (!t->written) copy_stretch<false>(call, *t->tensor, t->sample, stretch, t->buffer);
        t->row = t->buffer;
        t->row_stride = padded * t->size;
      } else {
        t->row = t->sample + j * t->size;
        t->row_stride = in_row * t->size;
      }
    }
    for (int64_t r = 0; r < tile.rows; ++r) {
      for (UsedTensor* t = used; t < end; t->row += t->row_stride, ++t) *t->pointer = t->row;
      run.count = padded;
      begin_run(run, r * in_row + j, n);
      kernel(run);
    }
    for (UsedTensor* t = used; t < end; ++t)
      if (is_copied(t) && t->written) copy_stretch<true>(call, *t->tensor, t->sample, stretch, t->buffer);
  }
}

// Returns the row number of sample b. The caller has checked t, but another thread may have written to it in the
// meantime. So the number is clamped to the rows of the table.
inline int64_t timestep(const Call& call, int64_t b) {
  const int64_t t = call.t != nullptr ? call.t[b * call.t_stride] : call.t_index;
  return std::clamp<int64_t>(t, 0, call.rows - 1);
}

// Calls range(b, first, last) for elements `first` to `last` - 1 of each of the tile.rows rows of sample b. The calls
// cover all elements of all samples. The tiles of all samples are one sequence that is divided among the threads. So a
// single large sample uses all threads, and so do many small samples.
template <class Range>
void for_each_range(const Call& call, Tile tile, Range range) {
  const int64_t columns = call.numel / tile.rows, per_sample = (columns + tile.columns - 1) / tile.columns;
  // The least number of elements for which a further thread is worthwhile: some microseconds of work. A thread
  // may start late on a busy machine, so it is not worthwhile for less work.
  const int64_t least = call.noise_kind == Noise::drawn ? 16384 : 32768;
  const int64_t grain = std::max<int64_t>(1, least / (std::min(tile.columns, columns) * tile.rows));
  parallel_for(call.batch * per_sample, grain, [&](int64_t begin, int64_t end) {
    for (int64_t tile_index = begin; tile_index < end;) {
      const int64_t b = tile_index / per_sample, from = tile_index % per_sample;
      const int64_t to = std::min(per_sample, from + (end - tile_index));
      range(b, from * tile.columns, std::min(to * tile.columns, columns));
      tile_index += to - from;
    }
  });
}

// Returns the draw, a word of the Philox counter, of samples with row t, for calls to which the caller passes no draw:
// StepRow::draw, or for other rows t.
template <class Row>
uint32_t draw_of(const Row*, int64_t t) {
  return static_cast<uint32_t>(t);
}
inline uint32_t draw_of(const StepRow* row, int64_t) { return row->draw; }

// Runs kernels over all samples of a call. has_weight(row) says whether a sample with this row needs the drawn noise.
// choose(noise) returns the kernel for this kind of noise. fill(run, b) sets the fields of a run that only this kind of
// call has, for sample b.
template <class Row, class Run, class AnyCall, class HasWeight, class Choose, class Fill>
void for_each_sample(const AnyCall& call, HasWeight has_weight, Choose choose, Fill fill) {
  const uint64_t seed = call.seed_data != nullptr ? static_cast<uint64_t>(*call.seed_data) : call.seed;
  const PhiloxKeys keys = philox_keys(seed);
  const Row* table = static_cast<const Row*>(call.table);

  const Tile tile = tile_of<Run>(call);
  for_each_range(call, tile, [&](int64_t b, int64_t first, int64_t last) {
    Run run{};
    run.keys = &keys;
    const int64_t t = table == nullptr ? 0 : timestep(call, b);
    const Row* row = table + t;
    run.row = row;
    const int64_t id = call.sample_ids != nullptr ? call.sample_ids[b * call.ids_stride] : call.first_id + b;
    const uint32_t draw = call.draw >= 0 ? static_cast<uint32_t>(call.draw) : draw_of(row, t);
    run.counter = philox_sample(keys, sample_counter(static_cast<uint64_t>(id), call.stream, draw));
    fill(run, b);
    const Noise noise = call.noise_kind == Noise::drawn && !has_weight(row) ? Noise::none : call.noise_kind;
    if constexpr (std::is_base_of_v<PixelsRun, Run>)
      if (noise == Noise::drawn) set_order(call, run);
    run_sample(choose(noise), call, run, b, first, last, tile);
  });
}

}  // namespace ddpm_ext::cpu
