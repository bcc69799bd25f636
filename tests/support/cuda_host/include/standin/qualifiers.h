// CUDA's qualifiers of functions and variables.
#pragma once

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__
// One block runs at a time, so that one copy for all blocks is each block's own. It starts with what the block before
// left there: as good as uninitialised.
#define __shared__ static
