// What the layers below ask of Python: to be without the GIL while they wait, and to warn.
#include "bindings/hooks.h"

#include <pybind11/pybind11.h>

#include <string>

#include "torch/gate.h"
#include "torch/warnings.h"

namespace py = pybind11;

namespace egm {
namespace {

// Note [Gates]: no thread waits for a gate while it holds the GIL.
void* release_gil() {
  // PyGILState_Check alone says yes where it is switched off.
  const bool held =
      Py_IsInitialized() && PyGILState_GetThisThreadState() != nullptr && PyGILState_Check();
  return held ? PyEval_SaveThread() : nullptr;
}

void take_gil_back(void* token) {
  if (token != nullptr) PyEval_RestoreThread(static_cast<PyThreadState*>(token));
}

void warn(const std::string& message) {
  if (!Py_IsInitialized()) return;
  py::gil_scoped_acquire locked;
  if (PyErr_WarnEx(PyExc_UserWarning, message.c_str(), 1) != 0) throw py::error_already_set();
}

}  // namespace

void set_python_hooks() {
  wait_hooks() = {release_gil, take_gil_back};
  warning_hook() = warn;
}

}  // namespace egm
