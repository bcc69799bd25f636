#define DDPM_ISA portable
#include "cpu/simd_portable.h"
// After the vector type.
#include "cpu/kernels_impl.h"
