// Results whose memory comes from the system in large pages.
#pragma once

#include <ATen/core/Tensor.h>

namespace ddpm_ext {

// `fresh`, whose memory was just allocated and not yet touched. A large one on the CPU, glibc's default, is new from
// the system each time, and to be given its pages of 4 KiB one by one costs several times what a step does.
at::Tensor in_large_pages(at::Tensor fresh);

}  // namespace ddpm_ext
