// The kernels compiled for AVX2, FMA and F16C. Standard headers must come before the pragma: otherwise one of their
// inline functions would be compiled for this instruction set, and the linker could give that copy to the other files,
// which then fail on machines without it. The functions of this project are always inlined.
#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif

#define DDPM_ISA avx2
#include "cpu/simd/avx2.h"
// The kernels come after the vector type.
#include "cpu/kernels/all.h"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
