// What of the CUDA sources and of the stand-in a test asks for; compiled as they are.
#pragma once

#include <stdint.h>

#include <string>
#include <vector>

#include "args.h"

namespace probe {

// Whether the kernels would load and store whole vectors.
bool takes_vectors(const ddpm_ext::Args& args);
bool takes_vectors(const ddpm_ext::ExtendedArgs& args);
float radius(uint32_t w);  // of core/normal.h, with the kernels' square root

// Sums of runs of `threads` numbers in three ways: through shared memory, by shuffles, by an atomic addition.
std::vector<std::vector<int64_t>> block_sums(const std::vector<int>& numbers, unsigned threads);

// Which number each of the threads of one block draws from a counter, by turns: their order.
std::vector<int> order_of_threads(unsigned threads);

// Launches one of the small kernels of probe.cu; errors are exceptions.
void run_kernel(const std::string& name, unsigned blocks, unsigned threads);

}  // namespace probe
