// What the machine has, for Python.
#pragma once

#include <torch/extension.h>

namespace egm {

// Throws py::value_error for an index that no device can have.
void check_device(int device);

void bind_machine(py::module_& module);

}  // namespace egm
