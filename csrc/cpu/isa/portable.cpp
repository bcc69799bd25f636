// The kernels in plain C++.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
// Only tests run these kernels on machines with SSE2, and they took longer to compile than most files.
#pragma GCC optimize("O1", "no-schedule-insns")
#endif

#include "cpu/simd/portable.h"
// The kernels come after the vector type.
#include "cpu/kernels/all.h"
