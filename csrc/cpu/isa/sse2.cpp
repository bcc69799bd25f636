// The kernels compiled for SSE2, which every x86-64 has.
#if defined(__x86_64__) && defined(__GNUC__)
#if !defined(__clang__)
// Few x86-64 CPUs do not have AVX2. With -O3 these kernels took longer to compile than any other file, because every
// fma has a branch with a call. With only these passes of the compiler, a step loses less than a tenth of its speed.
#pragma GCC optimize("O1", "no-schedule-insns", "inline-small-functions", "tree-vectorize", "gcse", "caller-saves")
#endif
#define DDPM_WITHOUT_FMA
#include "cpu/simd/sse2.h"
// This comes after the vector type, which the kernels use.
#include "cpu/kernels/all.h"
#endif
