// The two ways in which a kernel accesses memory, and the choice between them for a call.
#pragma once

#include <initializer_list>
#include <type_traits>
#include <utility>

#include "call.h"

namespace ddpm_ext::cuda {

// How a kernel accesses memory. `vector` moves up to 128 bits at a time and counts a sample's elements with 32 bits.
// `strided` moves one element at a time, with any strides, and counts with 64 bits. For a call that by_pixels has
// reordered, `strided` moves words of four elements.
enum class Access { vector, strided };

// The type in which a kernel counts samples and a sample's elements.
template <Access kAccess>
using IndexOf = std::conditional_t<kAccess == Access::vector, uint32_t, int64_t>;

// Calls visit(tensor) for each tensor of a call, even if its data is null.
template <class Visit>
void for_each_tensor(const ElementwiseCall& call, Visit visit) {
  for (const TensorArg* tensor : {&call.x, &call.model_output, &call.noise, &call.out}) visit(*tensor);
}
template <class Visit>
void for_each_tensor(const StepCall& call, Visit visit) {
  for (const TensorArg& tensor : call.inputs) visit(tensor);
  for (const TensorArg& tensor : call.results) visit(tensor);
  visit(call.input_again);
}
template <class Visit>
void for_each_tensor(const LossCall& call, Visit visit) {
  for (const TensorArg* tensor : {&call.model_output, &call.variance, &call.x_start, &call.noise}) visit(*tensor);
  for (const TensorArg* tensor : {&call.slope, &call.variance_slope}) visit(*tensor);
}

// Whether a tensor's address and batch stride allow Access::vector: samples begin at multiples of 16 bytes, and the
// batch stride fits into 32 bits.
inline bool in_vectors(const TensorArg& tensor, int64_t batch) {
  const int64_t size = tensor.dtype == DType::float32 ? 4 : 2;
  return reinterpret_cast<uintptr_t>(tensor.data) % 16 == 0 && (batch == 1 || tensor.batch_stride * size % 16 == 0) &&
         tensor.batch_stride < int64_t{1} << 32;
}

// Whether a call's samples are contiguous, and its sizes and its strides of t and of the sample ids are small enough
// for Access::vector.
inline bool in_vectors(const Call& call) {
  constexpr int64_t k31 = int64_t{1} << 31, k32 = int64_t{1} << 32;
  // With fewer than 2^31 elements in a sample, an element's index plus the step of a kernel's loop is below 2^32.
  return call.contiguous && call.numel < k31 && call.batch < k31 && call.t_stride < k32 && call.ids_stride < k32;
}

// Returns the access for a call: `vector` if the call and its tensors allow it, otherwise `strided`.
inline Access choose_access(const Call& call, std::initializer_list<const TensorArg*> tensors) {
  bool vector = in_vectors(call);
  for (const TensorArg* tensor : tensors) vector = vector && in_vectors(*tensor, call.batch);
  return vector ? Access::vector : Access::strided;
}

template <class AnyCall>
Access choose_access(const AnyCall& call) {
  bool vector = in_vectors(call);
  for_each_tensor(call, [&](const TensorArg& tensor) { vector = vector && in_vectors(tensor, call.batch); });
  return vector ? Access::vector : Access::strided;
}

inline Access choose_access(const StepCall& call) {
  for (const PerSample& factor : call.factors)
    if (factor.stride >= int64_t{1} << 32) return Access::strided;
  return choose_access<StepCall>(call);
}

constexpr int kLanes = 32;  // the lanes (threads) of a warp

// Returns the call with its dimensions in the order (pixels, channels), if Access::strided can process it by words of
// four elements in that order (cuda/pixels.cuh). This requires that the call draws noise, that its samples have at most
// kLanes channels and a multiple of four pixels and are channels_last in all tensors, and that contiguous samples with
// these sizes, addresses and batch strides could use Access::vector. Otherwise returns the call unchanged. The strides
// of a sample's dimensions are not swapped, since kernels do not read them in a contiguous call.
template <class AnyCall>
AnyCall by_pixels(const AnyCall& call) {
  AnyCall swapped = call;
  std::swap(swapped.sizes[0], swapped.sizes[1]);
  swapped.channels_last = call.sizes[0];
  swapped.contiguous = true;
  bool allowed = call.noise_kind == Noise::drawn && call.dims == 2 && call.sizes[0] <= kLanes &&
                 call.sizes[1] % 4 == 0 && choose_access(swapped) == Access::vector;
  for_each_tensor(call, [&](const TensorArg& tensor) {
    allowed = allowed && (tensor.data == nullptr || (tensor.strides[0] == 1 && tensor.strides[1] == call.sizes[0]));
  });
  return allowed ? swapped : call;
}

constexpr int64_t kMaxChannelsInTurn = 16;  // the largest result of channels_in_turn

// Returns how many channels a thread of Access::strided processes for its pixels, one after the other: all or one. If
// a strided call has two dimensions, they usually are (channels, pixels), and some tensors are channels_last. A warp
// that loads one channel of a channels_last tensor fetches the other channels, too. If the same warp then processes the
// other channels, they are still in the L1 cache. Returns 1 for a small sample, which needs as many threads as possible
// and is processed as if it had one channel. Also returns 1 for more than kMaxChannelsInTurn channels, if the number of
// pixels is not a multiple of four, and for another number of dimensions.
DDPM_HD int64_t channels_in_turn(const Call& call) {
  constexpr int64_t kManyPixels = 1 << 14;
  const bool worthwhile = call.dims == 2 && call.sizes[0] <= kMaxChannelsInTurn && call.sizes[1] >= kManyPixels;
  return worthwhile && call.sizes[1] % 4 == 0 ? call.sizes[0] : 1;
}

// The number of elements of a sample for which a launch needs threads. Threads that process several channels are needed
// for the elements of one channel only. A warp of a call that by_pixels has reordered processes as many whole quads
// (four pixels with all their channels) as fit into its lanes, and its other lanes are idle. Then the result counts
// whole warps, four elements for each lane.
inline int64_t elements_of_threads(const Call& call) {
  if (call.channels_last == 0) return call.numel / channels_in_turn(call);
  const int64_t at_once = 4 * (kLanes / call.channels_last * call.channels_last);
  return (call.numel + at_once - 1) / at_once * 4 * kLanes;
}

}  // namespace ddpm_ext::cuda
