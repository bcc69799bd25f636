// The kernels in plain C++.
#include "cpu/simd/portable.h"
// The kernels come after the vector type.
#include "cpu/kernels/all.h"
