// The class ddpm_ext._C.TableStep.
#pragma once

#include <torch/csrc/utils/pybind.h>

namespace ddpm_ext {

void define_table_step(pybind11::module_& m);

}  // namespace ddpm_ext
