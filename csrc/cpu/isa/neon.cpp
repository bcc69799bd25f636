// The kernels compiled for NEON, which every AArch64 has.
#if defined(__aarch64__)
#include "cpu/simd/neon.h"
// The kernels come after the vector type.
#include "cpu/kernels/all.h"
#endif
