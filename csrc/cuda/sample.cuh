// The values that all elements of a sample share: its start in memory, its row, its factors, and its part of the Philox
// counter.
#pragma once

#include <type_traits>

#include "call.h"
#include "core/philox.h"

namespace ddpm_ext::cuda {

// Returns the index of this block's sample, in a launch of shape_of_samples (launch.cuh). The grid is (blocks of a
// sample, samples, further samples), since a grid's y dimension is limited.
template <class Index>
__device__ __forceinline__ Index sample_of_block() {
  return static_cast<Index>(blockIdx.z) * gridDim.y + blockIdx.y;
}

// Returns the offset at which sample b begins. A 32-bit Index means that batch_stride is below 2^32.
template <class Index>
__device__ __forceinline__ int64_t sample_start(int64_t batch_stride, Index b) {
  if constexpr (sizeof(Index) == 4) return static_cast<uint64_t>(b) * static_cast<uint32_t>(batch_stride);
  return b * batch_stride;
}

// Returns the row number of sample b, clamped to the rows of the table.
template <class Index>
__device__ __forceinline__ int64_t sample_row(const Call& call, Index b) {
  int64_t t = call.t_index;
  if (call.t != nullptr) t = call.t[sample_start(call.t_stride, b)];
  return t < 0 ? 0 : t >= call.rows ? call.rows - 1 : t;  // nobody has checked a t in GPU memory
}

// Returns row t of the table. A row that the host has passed with the call takes no load.
template <class Row, class AnyCall>
__device__ __forceinline__ Row read_row(const AnyCall& call, int64_t t) {
  if constexpr (std::is_same_v<Row, StepRow>)
    if (call.has_row) return call.row;
  return static_cast<const Row*>(call.table)[t];
}

// Returns the factor of sample b, or 1 if `values` has no data.
template <class Index>
__device__ __forceinline__ float of_sample(const PerSample& values, Index b) {
  return values.data == nullptr ? 1.0f : values.data[sample_start(values.stride, b)];
}

// Returns the Philox state of sample b. row_draw is the noise's `draw` if the caller has not passed a draw.
template <class Index>
__device__ __forceinline__ PhiloxSample sample_noise(const Call& call, const PhiloxKeys& keys, Index b,
                                                     uint32_t row_draw) {
  uint64_t id = static_cast<uint64_t>(call.first_id) + b;
  if (call.sample_ids != nullptr) id = call.sample_ids[sample_start(call.ids_stride, b)];
  uint32_t draw = static_cast<uint32_t>(call.draw);  // this order of choices takes the fewest registers
  const bool from_memory = call.draw_data != nullptr;
  if (from_memory) draw = static_cast<uint32_t>(*call.draw_data);
  draw = from_memory || call.draw >= 0 ? draw : row_draw;
  return philox_sample(keys, sample_counter(id, call.stream, draw));
}

}  // namespace ddpm_ext::cuda
