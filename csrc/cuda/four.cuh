// Loads four neighbouring elements, for the kernels of x_start_scale.cu and output_scale.cu, which reduce a sample.
#pragma once

#include "cuda/access.cuh"
#include "cuda/memory.cuh"
#include "cuda/sample.cuh"

namespace ddpm_ext::cuda {

// Loads elements j to j + 3 of sample b into `to`, as float32. Elements beyond the sample's end are zero.
template <Access kAccess, class T>
__device__ __forceinline__ void load_four(const Call& call, const Dividers& dividers, const TensorArg& tensor,
                                          IndexOf<kAccess> b, IndexOf<kAccess> j, F2 (&to)[2]) {
  const T* const data = static_cast<const T*>(tensor.data) + sample_start(tensor.batch_stride, b);
  const auto numel = static_cast<IndexOf<kAccess>>(call.numel);
  if (kAccess == Access::vector && j + 4 <= numel) {
    Vector<T, 4> vector;
    vector.load(data + j);
    to[0] = widen(vector.pairs[0]), to[1] = widen(vector.pairs[1]);
    return;
  }
  float values[4] = {};
  DDPM_UNROLL
  for (int i = 0; i < 4; ++i) {
    if (j + i >= numel) break;
    int64_t offset = j + i;
    if constexpr (kAccess == Access::strided) {
      offset = 0;
      for_each_index(call, dividers, j + i, [&](int d, int64_t index) { offset += index * tensor.strides[d]; });
    }
    values[i] = to_float(data[offset]);
  }
  to[0] = F2(values[0], values[1]), to[1] = F2(values[2], values[3]);
}

}  // namespace ddpm_ext::cuda
