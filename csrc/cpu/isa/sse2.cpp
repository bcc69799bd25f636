// The kernels compiled for SSE2, which every x86-64 has.
#if defined(__x86_64__) && defined(__GNUC__)
#if !defined(__clang__)
// Hardly any machine is left without AVX2, and with -O3 these kernels took longer to compile than any other file: every
// fma has a branch to a call. With these passes alone, steps lose less than a tenth of their speed.
#pragma GCC optimize("O1", "no-schedule-insns", "inline-small-functions", "tree-vectorize", "gcse", "caller-saves")
#endif
#define DDPM_WITHOUT_FMA
#include "cpu/simd/sse2.h"
// The kernels come after the vector type.
#include "cpu/kernels/all.h"
#endif
