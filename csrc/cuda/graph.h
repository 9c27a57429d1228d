// Repeated launches of a CUDA graph, for the Python module.
#pragma once

#include <pybind11/pybind11.h>

namespace dwa_fast {

void register_graph(pybind11::module& m);

}  // namespace dwa_fast
