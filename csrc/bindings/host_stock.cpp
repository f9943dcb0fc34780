// The stock as a context manager.
#include "bindings/host_stock.h"

#include <memory>
#include <stdexcept>
#include <thread>

#include "bindings/machine.h"
#include "cuda/host_stock.h"

namespace py = pybind11;

namespace egm {
namespace {

// Its fields are changed under the GIL, or by the one thread that has entered it.
class BoundStock {
 public:
  BoundStock(DeviceIndex device, uint64_t size_bytes, uint64_t piece_bytes) {
    check_device(device);
    stock_ = std::make_unique<HostStock>(device, Bytes(size_bytes), Bytes(piece_bytes));
  }
  ~BoundStock() {
    // Dropped within its block by another thread: that thread still takes from it.
    if (scope_.release() != nullptr) stock_.release();
  }
  BoundStock(const BoundStock&) = delete;
  BoundStock& operator=(const BoundStock&) = delete;

  void enter() {
    if (!stock_ || entered_) throw std::runtime_error("a stock of host memory can be used once");
    entered_ = true;
    user_ = std::this_thread::get_id();
    scope_ = std::make_unique<HostStock::Scope>(*stock_);
  }

  void close() {
    if (entered_ && user_ != std::this_thread::get_id()) {
      throw std::runtime_error("another thread is using this stock of host memory");
    }
    scope_.reset();
    auto stock = std::move(stock_);
    if (!stock) return;
    py::gil_scoped_release unlocked;
    stock->stop();
    stock->wait();
    stock.reset();
  }

  uint64_t held_bytes() const { return stock_ ? stock_->held().count() : 0; }

 private:
  std::unique_ptr<HostStock> stock_;
  std::unique_ptr<HostStock::Scope> scope_;
  bool entered_ = false;
  std::thread::id user_;
};

}  // namespace

void bind_host_stock(py::module_& module) {
  py::class_<BoundStock>(module, "HostStock")
      .def(py::init<DeviceIndex, uint64_t, uint64_t>(), py::arg("device"), py::arg("size_bytes"),
           py::arg("piece_bytes"))
      .def(
          "__enter__",
          [](BoundStock& stock) -> BoundStock& {
            stock.enter();
            return stock;
          },
          py::return_value_policy::reference)
      .def("__exit__", [](BoundStock& stock, const py::args&) { stock.close(); })
      .def("close", &BoundStock::close)
      .def_property_readonly("held_bytes", &BoundStock::held_bytes);
}

}  // namespace egm
