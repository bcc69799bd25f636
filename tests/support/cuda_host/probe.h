// Functions by which tests reach into the CUDA sources and the stand-in. They are compiled like the CUDA sources.
#pragma once

#include <stdint.h>

#include <string>
#include <vector>

namespace probe {

float radius(uint32_t w);  // core/box_muller.h's radius, with the kernels' square root

// Computes the kernels' square root of every mantissa and both parities of the exponent, from every start value within
// 2^-22.9, the error that the manual of rsqrt.approx allows. Returns the number of start values and the number of
// results that were not correctly rounded, and then the same two numbers for the start values within 2^-23.3.
std::vector<int64_t> roots_from_every_start();

// The order in which a block's threads run: the number that each thread takes from a shared counter.
std::vector<int> order_of_threads(unsigned threads);

// Launches one of the small kernels of probe.cu. Errors become exceptions.
void run_kernel(const std::string& name, unsigned blocks, unsigned threads);

}  // namespace probe
