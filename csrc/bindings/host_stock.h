// Host memory that is brought up ahead, to Python.
#pragma once

#include <pybind11/pybind11.h>

namespace egm {

void bind_host_stock(pybind11::module_& module);

}  // namespace egm
