// Standard headers come before the pragma: an inline function compiled under it and merged by the linker with another
// file's copy would bring its instructions to machines that lack them. Ours are always inlined.
#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512dq,avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512dq,avx2,fma,f16c")
#endif

#define DDPM_ISA avx512
#include "cpu/simd_avx512.h"
// After the vector type.
#include "cpu/kernels_impl.h"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
