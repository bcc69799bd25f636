// A stand-in for the CUDA runtime, included before every CUDA source. With it, g++ compiles the kernels for the CPU,
// where sanitizers and guard pages check their memory accesses. It has only a small part of CUDA's functions and types,
// among them all that the sources use.
#pragma once

#include "standin/intrinsics.h"
#include "standin/launch.h"
#include "standin/qualifiers.h"
#include "standin/threads.h"
#include "standin/vector_types.h"
