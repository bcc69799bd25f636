// The kernels in plain C++.
#define DDPM_ISA portable
#include "cpu/simd/portable.h"
// The kernels come after the vector type.
#include "cpu/kernels/all.h"
