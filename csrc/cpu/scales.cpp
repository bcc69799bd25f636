// The operators x_start_scale and output_scale: they compute a factor for each sample from statistics of its elements.
#include "cpu/operators.h"

#include <vector>

#include "cpu/parallel.h"
#include "cpu/runs.h"
#include "cpu/strands.h"

namespace ddpm_ext::cpu {
namespace {

// Returns the number of elements in the whole tiles (kernel_table.h) that `numel` elements need.
int64_t whole_tiles(int64_t numel) { return (numel + kTile - 1) / kTile * kTile; }

// Returns the size of one sample's scratch memory for x_start_scale, in floats. It has the magnitudes, the maxima of
// their groups, and a quarter as many elements as magnitudes for the kernel `select`.
int64_t scratch_of_one(int64_t numel) {
  const int64_t tiles = whole_tiles(numel);
  return tiles + tiles / kGroup + tiles / 4;
}

// Whether x_start_scale processes a batch one sample after the other, each with all threads. It does if samples are
// large and the batch has fewer samples than there are threads. A batch of one sample is always processed in this way.
bool one_by_one(int64_t batch, int64_t numel) { return batch < at::get_num_threads() && numel >= 4 * 8192; }

// Computes the magnitudes of elements `first` to `last` - 1 of sample b, and the maxima of their groups. `first` is a
// multiple of kTile. `last` is a multiple of kTile or the end of the sample.
void fill_magnitudes(const XStartScaleCall& call, int64_t b, int64_t first, int64_t last, float* magnitudes,
                     int32_t* maxima) {
  const auto kernel = kernels().magnitudes[static_cast<int>(call.x.dtype)][static_cast<int>(call.model_output.dtype)];
  MagnitudesRun run{};
  if (call.table != nullptr) run.row = static_cast<const StepRow*>(call.table) + timestep(call, b);
  run.output_scale = call.output_scale.data == nullptr ? 1.0f : call.output_scale.data[b * call.output_scale.stride];
  run.sample_magnitudes = magnitudes;
  constexpr int64_t kStretch =
      4 * kTile;  // few enough that they are still in the L1 cache when the maxima are computed
  for (int64_t from = first; from < last; from += kStretch) {
    const int64_t to = std::min(last, from + kStretch), end = whole_tiles(to);
    run_sample(kernel, call, run, b, from, to);
    std::fill(magnitudes + to, magnitudes + end, 0.0f);
    kernels().group_maxima(magnitudes + from, end - from, maxima + from / kGroup);
  }
}

// Stores the factor of sample b, from its magnitudes and the maxima of their groups.
void finish_sample(const XStartScaleCall& call, int64_t b, const float* magnitudes, const int32_t* maxima,
                   int32_t* scratch) {
  Neighbours neighbours = kernels().select(magnitudes, maxima, whole_tiles(call.numel), call.rank.from_top, scratch);
  if (!call.rank.between()) neighbours.above = neighbours.below;
  call.scale[b] = threshold_scale(neighbours.below, neighbours.above, call.rank.weight, call.maximum);
}

}  // namespace

int64_t x_start_scale_scratch(int64_t batch, int64_t numel) {
  return scratch_of_one(numel) * (batch == 1 || one_by_one(batch, numel) ? 1 : at::get_num_threads());
}

void x_start_scale(const XStartScaleCall& call) {
  const int64_t tiles = whole_tiles(call.numel);
  const auto in_scratch = [&](int64_t slot, auto use) {
    float* magnitudes = call.scratch + slot * scratch_of_one(call.numel);
    int32_t* maxima = reinterpret_cast<int32_t*>(magnitudes + tiles);
    use(magnitudes, maxima, maxima + tiles / kGroup);
  };
  if (call.batch > 1 && !one_by_one(call.batch, call.numel)) {
    const int64_t grain = std::max<int64_t>(1, 8192 / call.numel);
    return parallel_for(call.batch, grain, [&](int64_t begin, int64_t end) {
      in_scratch(at::get_thread_num(), [&](float* magnitudes, int32_t* maxima, int32_t* scratch) {
        for (int64_t b = begin; b < end; ++b) {
          fill_magnitudes(call, b, 0, call.numel, magnitudes, maxima);
          finish_sample(call, b, magnitudes, maxima, scratch);
        }
      });
    });
  }
  in_scratch(0, [&](float* magnitudes, int32_t* maxima, int32_t* scratch) {
    for (int64_t b = 0; b < call.batch; ++b) {
      parallel_for(tiles / kTile, 8, [&](int64_t begin, int64_t end) {
        fill_magnitudes(call, b, begin * kTile, std::min(end * kTile, call.numel), magnitudes, maxima);
      });
      finish_sample(call, b, magnitudes, maxima, scratch);
    }
  });
}

namespace {

// One number for the model's output and one for the guided output.
struct OutputPair {
  double of_model = 0, of_guided = 0;
  void operator+=(const OutputPair& other) { of_model += other.of_model, of_guided += other.of_guided; }
};

// Stores the factor of sample b, from the moments of its chunks.
void finish_sample(const OutputScaleCall& call, int64_t b) {
  const int64_t chunks = loss_chunks(call.numel);
  const ChunkMoments* const moments = call.chunks + 2 * chunks * b;
  const OutputPair sums = sum_by_strands(chunks, [&](int64_t i) {
    const int64_t n = chunk_length(call.numel, i);
    return OutputPair{sum_term(moments[2 * i], n), sum_term(moments[2 * i + 1], n)};
  });
  const double length = static_cast<double>(call.numel);
  const OutputPair means = {sums.of_model / length, sums.of_guided / length};
  const OutputPair squares = sum_by_strands(chunks, [&](int64_t i) {
    const int64_t n = chunk_length(call.numel, i);
    return OutputPair{squares_term(moments[2 * i], n, means.of_model),
                      squares_term(moments[2 * i + 1], n, means.of_guided)};
  });
  call.scale[b] = spread_scale(squares.of_model, squares.of_guided, call.rescale);
}

}  // namespace

void output_scale(const OutputScaleCall& call) {
  const auto kernel = kernels().moments[static_cast<int>(call.model_output.dtype)];
  std::vector<char> finished(call.batch);
  const Tile tile = tile_of<MomentsRun>(call);
  for_each_range(call, tile, [&](int64_t b, int64_t first, int64_t last) {
    MomentsRun run{};
    run.guidance = call.guidance;
    run.sample_chunks = call.chunks + 2 * loss_chunks(call.numel) * b;
    run_sample(kernel, call, run, b, first, last, tile);
    if (first > 0 || last < call.numel / tile.rows) return;
    finish_sample(call, b);  // this thread has computed the moments of all chunks of the sample
    finished[b] = true;
  });
  for (int64_t b = 0; b < call.batch; ++b)
    if (!finished[b]) finish_sample(call, b);
}

}  // namespace ddpm_ext::cpu
