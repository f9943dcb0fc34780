// What the machine has, for Python.
#pragma once

#include <pybind11/pybind11.h>

namespace egm {

// Throws py::value_error for an index that no device can have.
void check_device(int device);

void bind_machine(pybind11::module_& module);

}  // namespace egm
