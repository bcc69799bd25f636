// The kernels in plain C++, without the instructions of any particular CPU.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
// Every x86-64 has SSE2, so only tests run these kernels there. With -O3 they took longer to compile than most files.
#pragma GCC optimize("O1", "no-schedule-insns")
#endif

#include "cpu/simd/portable.h"
// This comes after the vector type, which the kernels use.
#include "cpu/kernels/all.h"
