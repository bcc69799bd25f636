// The kernels compiled for NEON, which every AArch64 has.
#if defined(__aarch64__)
#include "cpu/simd/neon.h"
// This comes after the vector type, which the kernels use.
#include "cpu/kernels/all.h"
#endif
