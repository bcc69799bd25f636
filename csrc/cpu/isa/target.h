// All functions between DDPM_BEGIN_TARGET("names") and DDPM_END_TARGET are compiled for the named instruction sets.
// Standard headers must be included before. Otherwise their inline functions, too, would be compiled for these
// instruction sets. The linker could then use such a function in all other files, and they would fail on CPUs without
// the instructions. This cannot happen to functions of this project: they are always inlined, or belong to the
// namespace of one instruction set.
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
