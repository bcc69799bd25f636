// A stand-in for the CUDA runtime, which is included before every CUDA source. With it g++ compiles the kernels and
// they run on the CPU, where sanitizers and guard pages check each of their accesses. It has only what the sources use.
#pragma once

#include "standin/intrinsics.h"
#include "standin/launch.h"
#include "standin/qualifiers.h"
#include "standin/threads.h"
#include "standin/vector_types.h"
