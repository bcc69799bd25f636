// A kernel for each function of csrc/cuda/ptx.cuh. A thread processes one number or one word.
#include "cuda/ptx.cuh"

namespace cuda = ddpm_ext::cuda;

// Calls load_word_if with a word that holds *to, and stores the word to *to. So *to changes only if the condition
// holds.
template <class Word>
__device__ __forceinline__ void load_if(uint32_t condition, const Word* from, Word* to) {
  Word word = *to;
  cuda::load_word_if(condition != 0, from, word);
  *to = word;
}

extern "C" {

__global__ void rsqrt_approx(const float* x, float* y) { y[threadIdx.x] = cuda::rsqrt_approx(x[threadIdx.x]); }
__global__ void max_nan(const float* a, const float* b, float* c) {
  c[threadIdx.x] = cuda::max_nan(a[threadIdx.x], b[threadIdx.x]);
}
__global__ void min_nan(const float* a, const float* b, float* c) {
  c[threadIdx.x] = cuda::min_nan(a[threadIdx.x], b[threadIdx.x]);
}

__global__ void in_register(const float* from, float* to) { *cuda::in_register(to + threadIdx.x) = from[threadIdx.x]; }

__global__ void copy_128(const uint4* from, uint4* to) {
  cuda::store_word(to + threadIdx.x, cuda::load_word(from + threadIdx.x));
}
__global__ void copy_64(const uint2* from, uint2* to) {
  cuda::store_word(to + threadIdx.x, cuda::load_word(from + threadIdx.x));
}
__global__ void copy_32(const uint32_t* from, uint32_t* to) {
  cuda::store_word(to + threadIdx.x, cuda::load_word(from + threadIdx.x));
}
__global__ void load_128_if(const uint32_t* condition, const uint4* from, uint4* to) {
  load_if(condition[threadIdx.x], from + threadIdx.x, to + threadIdx.x);
}
__global__ void load_64_if(const uint32_t* condition, const uint2* from, uint2* to) {
  load_if(condition[threadIdx.x], from + threadIdx.x, to + threadIdx.x);
}

__global__ void keep_uses_behind(const float* from, float* to) {
  cuda::keep_uses_behind(from[threadIdx.x]);
  to[threadIdx.x] = from[threadIdx.x];
}

// Without make_opaque, the compiler would know the word and store the constant 5 ^ 3.
__global__ void opaque_32(uint32_t* to) {
  uint32_t word = 5;
  cuda::make_opaque(word);
  to[threadIdx.x] = word ^ 3;
}
__global__ void opaque_64(int64_t* to) {
  int64_t word = 5;
  cuda::make_opaque(word);
  to[threadIdx.x] = word ^ 3;
}

}  // extern "C"
