// Cuts a batch into runs for the kernels: it spreads the samples over threads and finds each sample's row and Philox
// counter. The ends of samples and strided memory are copied through a buffer, so that the kernels only see whole
// vectors in the order of the call's sizes.
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

constexpr int64_t kRow = 512;  // elements; a multiple of kRunMultiple and of kLossChunk
// A run through a buffer is at most one chunk, so an incomplete chunk is always a run of its own (kernels/spread.h).
static_assert(kRow == kLossChunk);
constexpr int64_t kBuffer = 32 * kRow;  // elements of all rows of a tile

// A tensor of a call, the field of a run that points to the tensor's elements, and whether the kernel writes them.
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

// Sets the fields of a run that depend on its position, besides its tensors. The run has n elements, from element j of
// the sample on.
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

// A run that reads its tensors directly, without a buffer, has a multiple of this many elements.
template <class Run>
constexpr int64_t kMultiple =
    std::is_same_v<Run, LossRun> || std::is_same_v<Run, MomentsRun> ? kLossChunk : kRunMultiple;

// The rows of a sample, and the columns of these rows, that are copied through a buffer at once. A kernel processes one
// row after the other.
struct Tile {
  int64_t rows, columns;
};

// Chooses the tile of a call:
// - (channels, pixels) with some tensors channels_last: the tile has all channels, so that it covers neighbouring
//   memory in both orders.
// - (pixels, channels): the tile is one row of whole pixels.
// - All other samples, and sums over (pixels, channels): the tile is one row, a chunk.
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
  const int64_t whole = kChunks ? kLossChunk : call.noise_kind == Noise::drawn ? 4 : 1;  // 4: a block of Philox
  if (rows > kBuffer / kUnit || columns < kUnit || columns % whole != 0) return chunk;
  return {rows, std::min(kRow, kBuffer / rows / kUnit * kUnit)};
}

// A thread's memory for `count` buffers, one for each tensor of a tile. `apart` is the distance between buffers in
// bytes. The thread keeps the memory for its next call. It is not on the stack, where buffers for 16 channels would not
// fit.
struct Buffers {
  char* first;
  size_t apart;
};
inline Buffers buffers_of(Tile tile, size_t count) {
  struct alignas(64) Line {
    char bytes[64];
  };
  static thread_local std::vector<Line> memory;
  const size_t lines = tile.rows * ((tile.columns + kRunMultiple - 1) / kRunMultiple * kRunMultiple) * 4 / sizeof(Line);
  if (memory.size() < count * lines) memory.resize(count * lines);
  return {memory.data()->bytes, lines * sizeof(Line)};
}

// Returns the same call with its dimensions in the order (pixels, channels).
template <class Run, class AnyCall>
AnyCall by_pixels(AnyCall call) {
  call.channels_last = call.sizes[0];
  std::swap(call.sizes[0], call.sizes[1]);
  Run run{};
  call.contiguous = true;
  for (const Part& part : parts_of(call, run)) {
    TensorArg& tensor = const_cast<TensorArg&>(*part.tensor);
    if (tensor.data == nullptr) continue;
    std::swap(tensor.strides[0], tensor.strides[1]);
    call.contiguous = call.contiguous && tensor.strides[1] == 1 && tensor.strides[0] == call.channels_last;
  }
  return call;
}

// Whether a sample lies in memory in the order of the call's sizes.
inline bool in_order(const Call& call, const TensorArg& tensor) {
  int64_t stride = 1;
  for (int d = call.dims - 1; d >= 0; stride *= call.sizes[d--])
    if (tensor.strides[d] != stride) return false;
  return true;
}

// Runs a kernel over elements `first` to `last` of each row of sample b. Contiguous tensors are passed directly. A
// buffer is used for memory in another order, and for elements that do not fill a whole run.
template <class AnyCall, class Run>
void run_sample(void (*kernel)(const Run&), const AnyCall& call, Run run, int64_t b, int64_t first, int64_t last,
                Tile tile = {1, kRow}) {
  const auto parts = parts_of(call, run);
  // The parts whose tensor the call has.
  struct Present {
    const TensorArg* tensor;
    void** place;
    bool written, ordered;
    char *sample, *buffer;
    int64_t size;        // of an element, in bytes
    char* row;           // of the tile: in the sample or in the buffer
    int64_t row_stride;  // in bytes
  } present[std::tuple_size_v<decltype(parts_of(call, run))>], *end = present;
  for (const Part& part : parts) {
    const TensorArg& tensor = *part.tensor;
    *part.place = nullptr;
    if (tensor.data == nullptr) continue;
    const int64_t size = element_size(tensor.dtype);
    char* const sample = static_cast<char*>(tensor.data) + b * tensor.batch_stride * size;
    *end++ = {&tensor, part.place, part.written, in_order(call, tensor), sample, nullptr, size, nullptr, 0};
  }
  const int64_t groups = call.channels_last > 0 ? whole_groups(call.channels_last) : 0;
  const int64_t multiple = groups > 0 ? groups : kMultiple<Run>, fill = groups > 0 ? groups : kRunMultiple;
  const int64_t direct = call.contiguous ? first + (last - first) / multiple * multiple : first;
  if (direct > first) {
    for (Present* part = present; part < end; ++part) *part->place = part->sample + first * part->size;
    run.count = direct - first;
    begin_run(run, first, run.count);
    kernel(run);
  }
  if (direct == last) return;
  const Buffers buffers = buffers_of(tile, end - present);
  for (Present* part = present; part < end; ++part) part->buffer = buffers.first + (part - present) * buffers.apart;
  const int64_t in_row = call.numel / tile.rows;
  for (int64_t j = direct; j < last; j += tile.columns) {
    const int64_t n = std::min(tile.columns, last - j), padded = (n + fill - 1) / fill * fill;
    const Stretch stretch = {tile.rows, j, n, padded};
    const auto is_copied = [&](const Present* part) { return n < padded || !part->ordered; };
    for (Present* part = present; part < end; ++part) {
      if (is_copied(part)) {
        if (!part->written) copy_stretch<false>(call, *part->tensor, part->sample, stretch, part->buffer);
        part->row = part->buffer;
        part->row_stride = padded * part->size;
      } else {
        part->row = part->sample + j * part->size;
        part->row_stride = in_row * part->size;
      }
    }
    for (int64_t r = 0; r < tile.rows; ++r) {
      for (Present* part = present; part < end; part->row += part->row_stride, ++part) *part->place = part->row;
      run.count = padded;
      begin_run(run, r * in_row + j, n);
      kernel(run);
    }
    for (Present* part = present; part < end; ++part)
      if (is_copied(part) && part->written)
        copy_stretch<true>(call, *part->tensor, part->sample, stretch, part->buffer);
  }
}

// The table row of sample b. t was checked before; the clamp guards against another thread writing to t in the
// meantime.
inline int64_t timestep(const Call& call, int64_t b) {
  const int64_t t = call.t != nullptr ? call.t[b * call.t_stride] : call.t_index;
  return std::clamp<int64_t>(t, 0, call.rows - 1);
}

// Calls range(b, first, last) for elements `first` to `last` of each row of sample b, until all elements of all samples
// are covered. Threads divide the whole batch as one sequence of tiles, so that one large sample is spread as well as
// many small ones.
template <class Range>
void for_each_range(const Call& call, Tile tile, Range range) {
  const int64_t columns = call.numel / tile.rows, per_sample = (columns + tile.columns - 1) / tile.columns;
  // The fewest elements that are worth another thread: some microseconds of work. On a busy machine a thread may start
  // late.
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

// The draw for row t if the caller gave none.
template <class Row>
uint32_t draw_of(const Row*, int64_t t) {
  return static_cast<uint32_t>(t);
}
inline uint32_t draw_of(const StepRow* row, int64_t) { return row->draw; }

// Runs kernels over all samples of a call. has_weight(row) says whether drawn noise has a weight in a sample with this
// row. choose(noise) returns the kernel. fill(run, b) sets the remaining fields of a run of sample b.
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
