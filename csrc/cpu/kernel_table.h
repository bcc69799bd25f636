// The table of one instruction set's CPU kernels, and the kernels' arguments. Most kernels process a run:
// elements of one sample that are contiguous in memory. Their number is a multiple of kRunMultiple.
#pragma once

#include "call.h"
#include "core/box_muller.h"
#include "core/forward.h"
#include "core/philox.h"
#include "core/step.h"

namespace ddpm_ext {

// The bits of an IEEE half, and of a bfloat16.
struct Float16 {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

constexpr int64_t kRunMultiple = 64;
// The most elements of a group (kernels/noise_by_pixels.h): the noise of 15 AVX-512 vectors of Philox blocks.
constexpr int64_t kMostInGroup = 960;
// A group's blocks, and padding that copies may read. One array of this size holds one element of every block.
constexpr int64_t kMostDrawn = kMostInGroup / 4 + 16;

// The fields that the runs of all noise-drawing kernels share.
struct NoisyRun {
  int64_t count;  // the number of elements
  const void* row;
  const PhiloxKeys* keys;
  PhiloxSample counter;
  uint32_t block;  // the first element's index / 4: in logical order, its Philox block
};

constexpr size_t kPage = 4096;  // bytes of a page of memory

// A thread's buffers for noise in the order (pixels, channels): see kernels/noise_by_pixels.h. `drawn` and `ordered`
// have one page each, because a copy that crosses a page boundary is slow: a run of many such copies takes up to a
// tenth longer.
struct PixelsMemory {
  alignas(kPage) float drawn[4 * kMostDrawn];       // a group's noise as drawn: array k has element k of every block
  alignas(kPage) float ordered[kMostInGroup + 16];  // a group's noise in memory order, and padding for the last copy
  alignas(64) uint64_t products[kMostInGroup / 4 + 16];  // what number_blocks computes for a group
  int64_t channels = 0, fours_in_sample = 0;             // the PixelsRun's numbers for which `products` was computed
  static_assert(sizeof(drawn) <= kPage && sizeof(ordered) <= kPage);
};

// A run whose elements are in logical order, or in the order (pixels, channels). In the order (pixels, channels) its
// elements are whole groups.
struct PixelsRun : NoisyRun {
  int64_t channels;         // 1 for logical order
  int64_t fours_in_sample;  // the number of pixels of a sample / 4: the Philox blocks of a channel
  PixelsMemory* memory;
};

// A run of the reverse step, of an affine operator or of randn. Its row is StepRow, AffineRow or null.
struct Run : PixelsRun {
  void *x, *model_output, *noise, *out;
  float clip_min, clip_max;
};

using RunKernel = void (*)(const Run&);

// A run of the step with options. Its row is StepRow.
struct StepRun : PixelsRun {
  void *inputs[kRoles], *results[kResults], *input_again;  // null for a tensor that the call does not have
  DType input_dtype;                                       // the dtype of model_input
  StepSample sample;
};

// A run of the loss. It begins at the first element of a chunk. Its row is LossRow or VariationalRow.
struct LossRun : NoisyRun {
  void *model_output, *variance, *x_start, *noise, *slope, *variance_slope;  // null for a tensor that is not passed
  int64_t valid;  // only the first `valid` of `count` elements belong to the sample
  Loss kind;
  bool detached;
  float delta, slope_share;
  double *sample_chunks, *chunks;  // where the sum of the sample's first chunk is stored, and of the run's first chunk
};

// A run that computes the magnitudes of the predicted clean sample or, if row is null, of x.
struct MagnitudesRun {
  void *x, *model_output, *uncond_output;  // null for a tensor that the call does not have
  int64_t count;
  const StepRow* row;
  float output_scale;
  float *sample_magnitudes, *magnitudes;  // where the first magnitude of the sample is stored, and of the run
};

// The layout for the selection of a quantile. Every kTile neighbouring magnitudes are a tile: a matrix in row-major
// order, of kGroup rows and kTileColumns columns. Here a group is one column of a tile, so vectors compute the maxima
// of neighbouring groups together. The maxima are computed first, since for a high quantile only the few groups with a
// large maximum need to be searched.
constexpr int64_t kGroup = 16, kTileColumns = 64, kTile = kGroup * kTileColumns;

// The bits of the two magnitudes between which a quantile lies.
struct Neighbours {
  uint32_t below, above;
};

// A run that computes the moments of its chunks. It begins at the first element of a chunk.
struct MomentsRun {
  void *model_output, *uncond_output;
  int64_t count, valid;  // only the first `valid` of `count` elements belong to the sample
  float guidance;
  // Where the moments of the sample's first chunk are stored, and of the run's first chunk. A chunk has two moments: of
  // the model's output and of the guided output.
  ChunkMoments *sample_chunks, *chunks;
};

using LossRunKernel = void (*)(const LossRun&);

// The kernels of one instruction set. An entry is null if no operator takes that pair of dtypes. Noise::none also
// stands for drawn noise that the row does not need.
struct Kernels {
  const char* name;  // of the instruction set
  // Indices: Noise, the dtype of x and out, the dtype of the second tensor. The second tensor is the model's output or,
  // for affine, the noise.
  RunKernel reverse_step[3][3][3];
  RunKernel affine[3][3][3];
  RunKernel randn[3];  // index: the dtype of out
  // Indices: whether noise is drawn, then the dtypes as for reverse_step.
  void (*step_with_options[2][3][3])(const StepRun&);
  // Indices: Noise, the dtype of x_start and noise, the dtype of the model's output. Every call has noise.
  LossRunKernel loss[3][3][3], variational_loss[3][3][3];
  // Indices: the dtype of x, the dtype of the model's output.
  void (*magnitudes[3][3])(const MagnitudesRun&);
  // Writes the bits of the largest magnitude of each group. The `count` magnitudes fill whole tiles.
  void (*group_maxima)(const float* magnitudes, int64_t count, int32_t* maxima);
  // Finds the from_top-th largest magnitude and the next larger one. The `count` magnitudes fill whole tiles. `scratch`
  // has count / 4 elements.
  Neighbours (*select)(const float* magnitudes, const int32_t* maxima, int64_t count, int64_t from_top,
                       int32_t* scratch);
  void (*moments[3])(const MomentsRun&);  // index: the dtype of the model's output
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
