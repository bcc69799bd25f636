// The kernels compiled for AVX-512.
#include "cpu/isa/target.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>

DDPM_BEGIN_TARGET("avx512f,avx512dq,avx512bw,avx2,fma,f16c")
#include "cpu/simd/avx512.h"
// This comes after the vector type, which the kernels use.
#include "cpu/kernels/all.h"
DDPM_END_TARGET
#endif
