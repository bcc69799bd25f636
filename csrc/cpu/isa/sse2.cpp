// The kernels compiled for SSE2, which every x86-64 has.
#if defined(__x86_64__) && defined(__GNUC__)
#define DDPM_WITHOUT_FMA
#include "cpu/simd/sse2.h"
// The kernels come after the vector type.
#include "cpu/kernels/all.h"
#endif
