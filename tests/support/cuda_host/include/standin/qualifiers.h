// CUDA's qualifiers for functions and variables.
#pragma once

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__
// One block runs at a time, so all blocks can share one copy. A block finds whatever the previous block left there,
// which is as good as uninitialised.
#define __shared__ static
