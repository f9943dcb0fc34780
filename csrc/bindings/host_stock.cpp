// The stock as a context manager.
#include "bindings/host_stock.h"

#include <optional>
#include <stdexcept>
#include <string>

#include "cuda/host_stock.h"

namespace py = pybind11;

namespace egm {
namespace {

class BoundStock {
 public:
  BoundStock(DeviceIndex device, uint64_t size_bytes, uint64_t piece_bytes) {
    if (device < 0 || device >= kMaxDevices) {
      throw std::invalid_argument("device is " + std::to_string(device) +
                                  "; allowed: a GPU's index");
    }
    stock_.emplace(device, Bytes(size_bytes), Bytes(piece_bytes));
  }
  void enter() {
    py::gil_scoped_release unlocked;
    if (!stock_ || scope_) throw std::runtime_error("a stock of host memory can be used once");
    scope_.emplace(*stock_);
  }
  void close() {
    py::gil_scoped_release unlocked;
    scope_.reset();
    stock_.reset();
  }
  uint64_t held_bytes() const { return stock_ ? stock_->held().count() : 0; }

 private:
  std::optional<HostStock> stock_;
  std::optional<HostStock::Scope> scope_;
};

}  // namespace

void bind_host_stock(py::module_& module) {
  py::class_<BoundStock>(module, "HostStock")
      .def(py::init<DeviceIndex, uint64_t, uint64_t>(), py::arg("device"), py::arg("size_bytes"),
           py::arg("piece_bytes"))
      .def("__enter__", &BoundStock::enter)
      .def("__exit__", [](BoundStock& stock, const py::args&) { stock.close(); })
      .def("close", &BoundStock::close)
      .def_property_readonly("held_bytes", &BoundStock::held_bytes);
}

}  // namespace egm
