// What the layers below ask of Python.
#pragma once

namespace egm {

void set_python_hooks();

}  // namespace egm
