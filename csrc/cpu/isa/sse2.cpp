// The kernels compiled for SSE2, which every x86-64 has.
#if defined(__x86_64__) && defined(__GNUC__)
#if !defined(__clang__)
// Few machines lack AVX2, and with -O3 these kernels took longer to compile than any other file, because every fma
// contains a branch to a call. With only these passes, a step loses less than a tenth of its speed.
#pragma GCC optimize("O1", "no-schedule-insns", "inline-small-functions", "tree-vectorize", "gcse", "caller-saves")
#endif
#define DDPM_WITHOUT_FMA
#include "cpu/simd/sse2.h"
// The kernels come after the vector type.
#include "cpu/kernels/all.h"
#endif
