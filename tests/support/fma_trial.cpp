// Three functions for tests/ops/test_fma_by_double.py, which calls them by ctypes. Two compute our fma for CPUs without
// an fma instruction: on vectors, and on single floats. The third calls the C library's fmaf, the expected result.
#define DDPM_WITHOUT_FMA
#include "cpu/simd/sse2.h"

using namespace ddpm_ext;

extern "C" {

// n is a multiple of 4.
void fma_of_vectors(int64_t n, const float* a, const float* b, const float* c, float* out) {
  using sse2::load;
  for (int64_t i = 0; i < n; i += 4) sse2::store(out + i, sse2::fma(load(a + i), load(b + i), load(c + i)));
}

void fma_of_numbers(int64_t n, const float* a, const float* b, const float* c, float* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = ddpm_ext::fma(a[i], b[i], c[i]);
}

// The fma of the C library. The C standard requires that it rounds only once.
void fma_of_libm(int64_t n, const float* a, const float* b, const float* c, float* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = ::fmaf(a[i], b[i], c[i]);
}
}
