// DDPM_BEGIN_TARGET("names") has all functions up to DDPM_END_TARGET compiled for an instruction set. Standard headers
// must come before it: otherwise one of their inline functions would be compiled for this instruction set, and the
// linker could give that copy to the other files, which then fail on machines without it. The functions of this project
// are always inlined.
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
