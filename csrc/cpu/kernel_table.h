// The table of the CPU kernels of one instruction set, and the arguments of a kernel. A kernel processes a run:
// elements of one sample, contiguous in memory, whose number is a multiple of kRunMultiple.
#pragma once

#include "call.h"
#include "core/box_muller.h"
#include "core/forward.h"
#include "core/philox.h"
#include "core/step.h"

namespace ddpm_ext {

struct Float16 {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

constexpr int64_t kRunMultiple = 64;
constexpr int64_t kMostInGroup = 960;                  // elements (kernels/noise_by_pixels.h), of 15 vectors of AVX-512
constexpr int64_t kMostDrawn = kMostInGroup / 4 + 16;  // of them for one pixel of four, and what is read behind them

// What the runs of all kernels that may draw noise have.
struct NoisyRun {
  int64_t count;
  const void* row;
  const PhiloxKeys* keys;
  PhiloxSample counter;
  uint32_t block;  // Philox's block of the first element
};

constexpr size_t kPage = 4096;

// A thread's memory for the noise of runs in the order (pixels, channels). Copies go from page to page: one across the
// border of two takes so long that a run of many is up to a tenth slower.
struct PixelsMemory {
  alignas(kPage) float drawn[4 * kMostDrawn];            // of a group, by pixels of four
  alignas(kPage) float ordered[kMostInGroup + 16];       // of a group, and what is copied behind the last stretch
  alignas(64) uint64_t products[kMostInGroup / 4 + 16];  // of the first vector, and what is added to them
  int64_t channels = 0, fours_in_sample = 0;             // those that the products are for
  static_assert(sizeof(drawn) <= kPage && sizeof(ordered) <= kPage);
};

// A run whose order is that of logical indices, or (pixels, channels). Then it has whole groups.
struct PixelsRun : NoisyRun {
  int64_t channels;         // 1 for logical order
  int64_t fours_in_sample;  // of the pixels of a channel
  PixelsMemory* memory;
};

// Its row is StepRow or AffineRow.
struct Run : PixelsRun {
  void *x, *model_output, *noise, *out;
  float clip_min, clip_max;
};

using RunKernel = void (*)(const Run&);

// A run of the step with options. Its row is StepRow.
struct StepRun : PixelsRun {
  void *inputs[kRoles], *results[kResults], *input_again;  // null: the call does not have it
  DType input_dtype;                                       // of model_input
  StepSample sample;
};

// A run of the loss begins at the first element of a chunk. Its row is LossRow or VariationalRow.
struct LossRun : NoisyRun {
  void *model_output, *variance, *x_start, *noise, *slope, *variance_slope;  // null: the call does not have it
  int64_t valid;  // only the first `valid` of `count` elements belong to the sample
  Loss kind;
  bool detached;
  float delta, slope_share;
  double *sample_chunks, *chunks;  // the sums of the sample's chunks, and the first of the run's
};

// The magnitudes of the predicted clean sample, or without a row of x.
struct MagnitudesRun {
  void *x, *model_output, *uncond_output;  // null: the call does not have it
  int64_t count;
  const StepRow* row;
  float output_scale;
  float *sample_magnitudes, *magnitudes;  // where those of the sample begin, and those of the run
};

// Magnitudes come in tiles of kGroup rows. A group is one column of a tile.
constexpr int64_t kGroup = 16, kTileColumns = 64, kTile = kGroup * kTileColumns;

// Two magnitudes between which a quantile lies.
struct Neighbours {
  uint32_t below, above;
};

// The moments of a run's chunks. A run begins at the first element of a chunk.
struct MomentsRun {
  void *model_output, *uncond_output;
  int64_t count, valid;  // only the first `valid` of `count` elements belong to the sample
  float guidance;
  ChunkMoments *sample_chunks, *chunks;  // two for each chunk: of the model's output and of the guided one
};

using LossRunKernel = void (*)(const LossRun&);

struct Kernels {
  const char* name;
  // By Noise, by the dtype of x and out, and by the dtype of the second tensor, which is the model's output or, for
  // affine, the noise. Null where no operator takes that pair.
  RunKernel reverse_step[3][3][3];
  RunKernel affine[3][3][3];
  RunKernel randn[3];  // by the dtype of out
  // By whether noise is drawn, then by the dtypes as for reverse_step.
  void (*step_with_options[2][3][3])(const StepRun&);
  // By Noise (none if the noise has no weight), by the dtype of x_start and noise, by the dtype of the model's output.
  LossRunKernel loss[3][3][3], variational_loss[3][3][3];
  // By the dtype of x, by the dtype of the model's output.
  void (*magnitudes[3][3])(const MagnitudesRun&);
  // Writes the greatest magnitude of each group of `count` ones, whole tiles.
  void (*group_maxima)(const float* magnitudes, int64_t count, int32_t* maxima);
  // Finds the from_top-th largest of `count` magnitudes, whole tiles, and the next larger one. `scratch` has a quarter
  // of their number.
  Neighbours (*select)(const float* magnitudes, const int32_t* maxima, int64_t count, int64_t from_top,
                       int32_t* scratch);
  void (*moments[3])(const MomentsRun&);  // by the dtype of the model's output
};

#define DDPM_DECLARE_KERNELS(isa) \
  namespace isa {                 \
  extern const Kernels kernels;   \
  }
DDPM_DECLARE_KERNELS(portable)
DDPM_DECLARE_KERNELS(neon)
DDPM_DECLARE_KERNELS(sse2)
DDPM_DECLARE_KERNELS(avx2)
DDPM_DECLARE_KERNELS(avx512)

}  // namespace ddpm_ext
