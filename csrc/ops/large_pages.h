// Asks the system for large pages for the memory of a result.
#pragma once

#include <ATen/core/Tensor.h>

namespace ddpm_ext {

// Returns `fresh`, whose memory has just been allocated and not been touched. On the CPU, glibc takes a large block
// from the system each time it is allocated, and to receive its pages of 4 KiB one by one costs several times as much
// as a step.
at::Tensor in_large_pages(at::Tensor fresh);

}  // namespace ddpm_ext
