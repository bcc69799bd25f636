// What an operator hands to a kernel on either device: plain data, no torch.
#pragma once

#include <stdint.h>

#include "core/extended.h"
#include "core/loss.h"

namespace ddpm_ext {

enum class DType : int { float32, float16, bfloat16 };
enum class Noise : int { none, given, drawn };

constexpr int kMaxDims = 8;  // of a sample, after neighbouring dimensions are merged

// One tensor of shape (batch, sizes...): strides in elements.
struct TensorArg {
  void* data = nullptr;
  DType dtype = DType::float32;
  int64_t batch_stride = 0;
  int64_t strides[kMaxDims] = {};
};

// What every operator's call has.
struct Call {
  int64_t batch = 0;
  int64_t numel = 0;  // of one sample
  int dims = 0;
  int64_t sizes[kMaxDims] = {1, 1, 1, 1, 1, 1, 1, 1};  // a GPU may divide by one that it has no use for
  bool contiguous = false;                             // inside a sample, for all of the call's tensors

  // The row of each sample: table[t[i * t_stride]], or table[t_index] where t is null.
  const void* table = nullptr;
  int64_t rows = 0;
  const int64_t* t = nullptr;
  int64_t t_stride = 0;
  int64_t t_index = 0;
  float clip_min = 0, clip_max = 0;

  // The noise. A null pointer means the value beside it.
  Noise noise_kind = Noise::none;
  const int64_t* seed_data = nullptr;
  uint64_t seed = 0;
  const int64_t* sample_ids = nullptr;
  int64_t ids_stride = 0;
  int64_t first_id = 0;
  uint32_t stream = 0;
  int64_t draw = 0;  // negative: the table's
};

// Rows are StepRow or AffineRow. Those tensors that an operator doesn't have: data is null.
struct Args : Call {
  TensorArg x, model_output, noise, out;
};

// One number a sample, float32; a null pointer means 1 for all.
struct PerSample {
  const float* data = nullptr;
  int64_t stride = 0;
};

// Of the extended step: rows are ExtendedRow.
struct ExtendedArgs : Call {
  TensorArg inputs[kRoles], results[kResults];
  PerSample output_scale, x_start_scale;
  Variance variance_kind = Variance::of_row;

  DDPM_HD const TensorArg& operator[](Role role) const { return inputs[static_cast<int>(role)]; }
  DDPM_HD const TensorArg& operator[](Result result) const { return results[static_cast<int>(result)]; }
  TensorArg& operator[](Role role) { return inputs[static_cast<int>(role)]; }
  TensorArg& operator[](Result result) { return results[static_cast<int>(result)]; }
};

// Of a training loss: rows are LossRow, or with the variational bound VariationalRow.
struct LossArgs : Call {
  TensorArg model_output, variance, x_start, noise;
  TensorArg slope, variance_slope;  // float32, written; null: not wanted
  Loss kind = Loss::mse;
  float delta = 1;
  bool variational = false, detached = false;
  float slope_share = 0;            // what a slope is multiplied by, beside its row's weight
  double per_element = 0;           // 1 / numel
  double* chunks = nullptr;         // (batch, chunks of a sample): their sums, scratch
  uint32_t* blocks_done = nullptr;  // (batch + 1,), zeros: scratch of a GPU
  float* loss = nullptr;            // (batch,), written
  float* total = nullptr;           // their sum times total_factor, written; null: not wanted
  double total_factor = 1;
};

DDPM_HD constexpr int64_t loss_chunks(int64_t numel) { return (numel + kLossChunk - 1) / kLossChunk; }

}  // namespace ddpm_ext
