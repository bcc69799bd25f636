// What Python asks before a call that is like the last one: ddpm_ext._C.RepeatedCall, unchanged and index_of.
#pragma once

#include <torch/csrc/utils/pybind.h>

namespace ddpm_ext {

void define_repeated_call(pybind11::module_& m);

}  // namespace ddpm_ext
