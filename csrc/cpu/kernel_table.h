// The table of the CPU kernels of one instruction set, and the arguments of a kernel. A kernel processes a run:
// elements of one sample, contiguous in memory, whose number is a multiple of kRunMultiple.
#pragma once

#include "call.h"
#include "core/forward.h"
#include "core/normal.h"
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

struct Run {
  void *x, *model_output, *noise, *out;
  int64_t count;
  const void* row;  // StepRow or AffineRow
  float clip_min, clip_max;
  const PhiloxKeys* keys;
  PhiloxSample counter;
  uint32_t block;  // Philox's block of the first element
};

using RunKernel = void (*)(const Run&);

// A run of a step with optional arguments (core/options.h).
template <class Step>
struct StepRun {
  void *inputs[kRoles<Step>], *results[kResults<Step>];  // null: the call does not have it
  int64_t count;
  const void* row;  // Step::Row
  StepSample<Step> sample;
  const PhiloxKeys* keys;
  PhiloxSample counter;
  uint32_t block;
};

template <class Step>
using StepRunKernel = void (*)(const StepRun<Step>&);

// A run of the loss begins at the first element of a chunk.
struct LossRun {
  void *model_output, *variance, *x_start, *noise, *slope, *variance_slope;  // null: the call does not have it
  int64_t count, valid;  // only the first `valid` of `count` elements belong to the sample
  const void* row;       // LossRow or VariationalRow
  Loss kind;
  bool detached;
  float delta, slope_share;
  double *sample_chunks, *chunks;  // the sums of the sample's chunks, and the first of the run's
  const PhiloxKeys* keys;
  PhiloxSample counter;
  uint32_t block;
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
  StepRunKernel<ExtendedStep> extended_step[2][3][3];
  StepRunKernel<LinearStep> linear_step[2][3][3];
  // By Noise (none if the noise has no weight), by the dtype of x_start and noise, by the dtype of the model's output.
  LossRunKernel loss[3][3][3], variational_loss[3][3][3];
};

namespace portable {
extern const Kernels kernels;
}
namespace neon {
extern const Kernels kernels;
}
namespace sse2 {
extern const Kernels kernels;
}
namespace avx2 {
extern const Kernels kernels;
}
namespace avx512 {
extern const Kernels kernels;
}

}  // namespace ddpm_ext
