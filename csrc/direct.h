// The short way of a training step, in one call from Python: see vadiff/eager.py.
#pragma once

#include <pybind11/pybind11.h>

namespace vadiff {

// Adds `direct_step` and `direct_scale` to the module, and `know_torch`, which comes before both.
void define_direct_step(pybind11::module_& m);

}  // namespace vadiff
