// A stand-in for the CUDA runtime, included before every CUDA source: plain g++ compiles the kernels, and they run on
// the CPU, where sanitizers and guard pages see each of their accesses. It has what the sources use, no more.
#pragma once

#include "standin/intrinsics.h"
#include "standin/launch.h"
#include "standin/qualifiers.h"
#include "standin/threads.h"
#include "standin/vector_types.h"
