// The arguments of an operator call, as the CPU and the CUDA kernels receive them. Nothing in this file depends on
// torch.
#pragma once

#include <stdint.h>

#include "core/loss.h"
#include "core/quantile.h"
#include "core/spread.h"
#include "core/step.h"
#include "core/step_inputs.h"

namespace ddpm_ext {

enum class DType : int { float32, float16, bfloat16 };
// The noise of a call: no noise, a tensor of the caller, or noise that the kernel draws.
enum class Noise : int { none, given, drawn };

constexpr int kMaxDims = 8;  // of a sample, after merging neighbouring dimensions

// A tensor of shape (batch, sizes...), where Call has the sizes. Strides count elements. `strides` are those of a
// sample's dimensions, in the order in which a kernel iterates over them (Order in ops/fill_call.h). `data` is null if
// the call does not have the tensor.
struct TensorArg {
  void* data = nullptr;
  DType dtype = DType::float32;
  int64_t batch_stride = 0;
  int64_t strides[kMaxDims] = {};
};

// The fields that the calls of all operators share.
struct Call {
  int64_t batch = 0;
  int64_t numel = 0;  // the number of elements of one sample
  int dims = 0;
  // The sizes of a sample's `dims` dimensions. The other sizes are 1.
  int64_t sizes[kMaxDims] = {1, 1, 1, 1, 1, 1, 1, 1};
  bool contiguous = false;  // whether the samples of every tensor are contiguous, in the order of `sizes`

  // Sample i takes the row table[t[i * t_stride]], or table[t_index] if t is null. Kernels clamp the number of the row
  // to the table's rows.
  const void* table = nullptr;
  int64_t rows = 0;
  const int64_t* t = nullptr;
  int64_t t_stride = 0;
  int64_t t_index = 0;
  float clip_min = 0, clip_max = 0;

  // The noise (core/philox.h). If seed_data is not null, the number there replaces seed. Sample i has the id
  // first_id + i, or sample_ids[i * ids_stride] if sample_ids is not null.
  Noise noise_kind = Noise::none;
  const int64_t* seed_data = nullptr;
  uint64_t seed = 0;
  const int64_t* sample_ids = nullptr;
  int64_t ids_stride = 0;
  int64_t first_id = 0;
  uint32_t stream = 0;
  int64_t draw = 0;                    // if negative: StepRow::draw, or the row's number for other rows
  const int64_t* draw_data = nullptr;  // if not null, the low 32 bits of the number there replace `draw`
  // Noise is defined by logical indices. In a call that draws noise for channels_last memory, by_pixels (cpu/runs.h,
  // cuda/access.cuh) may change the sizes from (channels, pixels) to (pixels, channels). Then channels_last is the
  // number of channels, and the number of pixels is a multiple of four. Otherwise channels_last is 0.
  int64_t channels_last = 0;
};

// A call of an affine operator or of randn. The rows of an affine operator are AffineRow, and its second tensor is
// `noise`. On the CPU an affine operator that draws noise also writes it to `noise`, if that has data. randn has no
// rows.
struct ElementwiseCall : Call {
  TensorArg x, model_output, noise, out;
};

// The row of a step in which all samples take the same row and the host has the table. A CUDA kernel receives the row
// as an argument and does not load it. A CPU kernel reads the table.
struct HostRow {
  bool has_row = false;
  StepRow row;
};

// A call of the reverse step. Rows are StepRow.
struct ReverseStepCall : ElementwiseCall, HostRow {};

// A float32 factor for each sample. If `data` is null, the factor is 1 for all samples.
struct PerSample {
  const float* data = nullptr;
  int64_t stride = 0;
};

// A call of the step with options. Rows are StepRow.
struct StepCall : Call, HostRow {
  TensorArg inputs[kRoles], results[kResults];
  TensorArg input_again;  // the second half of a model_input that has twice the batch
  PerSample factors[kFactors];
  Variance variance = Variance::of_row;

  DDPM_HD const TensorArg& operator[](Role role) const { return inputs[static_cast<int>(role)]; }
  DDPM_HD const TensorArg& operator[](Result result) const { return results[static_cast<int>(result)]; }
  TensorArg& operator[](Role role) { return inputs[static_cast<int>(role)]; }
  TensorArg& operator[](Result result) { return results[static_cast<int>(result)]; }
};

// A call of a training loss. Rows are LossRow, or VariationalRow for a loss with the variational bound.
struct LossCall : Call {
  TensorArg model_output, variance, x_start, noise;
  // float32 results, if they have data: the loss's derivatives by the model's output and by `variance`
  TensorArg slope, variance_slope;
  Loss kind = Loss::mse;
  float delta = 1;
  bool variational = false, detached = false;
  float slope_share = 0;     // an element's share in the returned loss: 1 / numel, or 1 / (batch numel) for a mean
  double per_element = 0;    // 1 / numel
  double* chunks = nullptr;  // (batch, loss_chunks(numel)): scratch memory for the sums of the chunks
  float* loss = nullptr;     // the result, (batch,)
  float* total = nullptr;    // if not null, a second result: the sum of the losses times total_factor
  double total_factor = 1;
};

// A call of x_start_scale. Rows are StepRow. Without a table, x is the clean sample itself.
struct XStartScaleCall : Call {
  TensorArg x, model_output, uncond_output;
  PerSample output_scale;
  QuantileRank rank;
  float maximum = 0;
  float* scale = nullptr;    // the result, (batch,)
  float* scratch = nullptr;  // scratch memory of x_start_scale_scratch(batch, numel) floats, a function of each device
};

// A call of output_scale.
struct OutputScaleCall : Call {
  TensorArg model_output, uncond_output;
  float guidance = 1;  // the scale of classifier-free guidance
  double rescale = 0;
  ChunkMoments* chunks = nullptr;  // scratch memory (batch, loss_chunks(numel), 2): model's output, guided output
  float* scale = nullptr;          // the result, (batch,)
};

// Returns the number of chunks (core/loss.h) of a sample.
DDPM_HD constexpr int64_t loss_chunks(int64_t numel) { return (numel + kLossChunk - 1) / kLossChunk; }

}  // namespace ddpm_ext
