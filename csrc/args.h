// What an operator hands to a kernel on either device: plain data, no torch.
#pragma once

#include <stdint.h>

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

struct Args {
  int64_t batch = 0;
  int64_t numel = 0;  // of one sample
  int dims = 0;
  int64_t sizes[kMaxDims] = {1, 1, 1, 1, 1, 1, 1, 1};  // a GPU may divide by one that it has no use for
  bool contiguous = false;                             // inside a sample, for all four tensors

  TensorArg x, model_output, noise, out;  // those that an operator doesn't have: data is null

  // The row of each sample: table[t[i * t_stride]], or table[t_index] where t is null. Rows are StepRow or AffineRow.
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

}  // namespace ddpm_ext
