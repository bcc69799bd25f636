// Functions that call single device functions of the CUDA sources, or small kernels, for tests. They are compiled like
// the CUDA sources.
#pragma once

#include <stdint.h>

#include <string>
#include <vector>

namespace probe {

// Returns radius of core/box_muller.h, computed with the CUDA kernels' square root.
float radius(uint32_t w);

// Computes the CUDA kernels' square root for every mantissa and both parities of the exponent. It starts from every
// approximation of 1 / sqrt(x) with a relative error of at most 2^-22.9, the error that the manual of rsqrt.approx
// allows. Returns the number of start values and the number of results that are not correctly rounded, and then the
// same two numbers for the start values with an error of at most 2^-23.3. For those, cuda/pair.cuh promises correctly
// rounded results; farther off, there may be exceptions.
std::vector<int64_t> roots_from_every_start();

// Returns the order in which the threads of a block run: for each thread, the number of threads that ran before it.
std::vector<int> order_of_threads(unsigned threads);

// Launches the small kernel of probe.cu with this name. Throws an exception if the launch returns an error.
void run_kernel(const std::string& name, unsigned blocks, unsigned threads);

}  // namespace probe
