// CUDA's qualifiers for functions and variables, as macros for g++.
#pragma once

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__
// Shared memory is a static variable, which is one copy for all blocks. That suffices, since one block runs at a time.
// At its start a block finds the values of the previous block there. A kernel must not use them, like any uninitialised
// memory.
#define __shared__ static
