// All functions between DDPM_BEGIN_TARGET("names") and DDPM_END_TARGET are compiled for an instruction set. Standard
// headers must be included before. Otherwise one of their inline functions would be compiled for this instruction set,
// and the linker could use that copy for the other files, which would then fail on machines without it. The functions
// of this project are always inlined.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#include <utility>

#define DDPM_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define DDPM_BEGIN_TARGET(names) DDPM_PRAGMA(clang attribute push(__attribute__((target(names))), apply_to = function))
#define DDPM_END_TARGET DDPM_PRAGMA(clang attribute pop)
#else
#define DDPM_BEGIN_TARGET(names) DDPM_PRAGMA(GCC push_options) DDPM_PRAGMA(GCC target(names))
#define DDPM_END_TARGET DDPM_PRAGMA(GCC pop_options)
#endif
