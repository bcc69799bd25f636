// The operators as functions of ddpm_ext._C, for eager calls.
#pragma once

#include <torch/csrc/utils/pybind.h>

namespace ddpm_ext::eager {

// Adds the functions to the module.
void define(pybind11::module_& m);

}  // namespace ddpm_ext::eager
