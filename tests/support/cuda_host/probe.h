// Functions by which tests reach into the CUDA sources and the stand-in. They are compiled like the CUDA sources.
#pragma once

#include <stdint.h>

#include <string>
#include <vector>

namespace probe {

float radius(uint32_t w);  // that of core/box_muller.h with the kernels' square root

// Takes the kernels' square root of every mantissa and both parities of the exponent, from every start within 2^-22.9,
// the error that the manual of rsqrt.approx allows. Returns how many starts there were and how many roots were not
// correctly rounded, and both again for the starts within 2^-23.3.
std::vector<int64_t> roots_from_every_start();

// The order of a block's threads: the number that each of them takes from a counter.
std::vector<int> order_of_threads(unsigned threads);

// Launches one of the small kernels of probe.cu. Errors become exceptions.
void run_kernel(const std::string& name, unsigned blocks, unsigned threads);

}  // namespace probe
