// What the machine has, for Python.
#include "bindings/machine.h"

#include <pybind11/stl.h>

#include <optional>
#include <string>
#include <system_error>

#include "core/host_memory.h"
#include "core/host_range.h"
#include "core/kernel_files.h"
#include "core/page_nodes.h"
#include "core/reserve.h"
#include "core/state.h"
#include "cuda/host_books.h"
#include "cuda/host_reserve.h"
#include "cuda/traits.h"
#include "torch/install.h"

namespace py = pybind11;

namespace egm {

namespace {

DeviceTraits ask_traits(int device) {
  check_device(device);
  py::gil_scoped_release unlocked;
  return device_traits(device);
}

py::dict traits_of(int device) {
  const DeviceTraits traits = ask_traits(device);
  py::dict result;
  result["managed"] = traits.managed;
  result["concurrent_managed_access"] = traits.concurrent_managed_access;
  result["pageable_memory_access"] = traits.pageable_memory_access;
  result["uses_host_page_tables"] = traits.uses_host_page_tables;
  result["integrated"] = traits.integrated;
  result["host_numa_vmm"] = traits.host_numa_vmm;
  result["registered_host_pointers"] = traits.registered_host_pointers;
  result["host_numa_node"] = traits.host_numa_node;
  result["hbm_numa_node"] = traits.hbm_numa_node;
  result["egm_carveout"] = traits.egm_carveout;
  return result;
}

py::tuple choice_for(int device) {
  const Choice choice = choose_backing(ask_traits(device));
  return py::make_tuple(to_string(choice.backing), choice.reason);
}

// The least that bounds this process, and which limit that is. Asks nothing of CUDA, so GPU memory
// that the kernel counts is in it.
py::tuple host_total() {
  const auto limits = host_limits({});
  const MemoryLimit& least = least_total(limits);
  return py::make_tuple(least.total.count(), least.name);
}

py::dict host_memory_now() {
  HostMemory host;
  {
    py::gil_scoped_release unlocked;
    host = host_memory(hbm_nodes());
  }
  const Bytes reserve = state().config.get().host_reserve.value_or(default_reserve(host.total));
  py::dict result;
  result["total_bytes"] = host.total.count();
  result["available_bytes"] = host.available.count();
  result["limited_by"] = host.limited_by;
  result["reserve_bytes"] = reserve.count();
  return result;
}

py::dict host_bookings() {
  Bookings now;
  {
    py::gil_scoped_release unlocked;
    tell_hbm_of_torch();
    now = bookings();
  }
  py::dict result;
  result["promised_bytes"] = now.promised.count();
  result["others_promised_bytes"] = now.others.promised.count();
  result["others_pending_bytes"] = now.others.pending.count();
  result["others_carveout_bytes"] = now.others.carveout.count();
  result["other_processes"] = now.other_processes;
  result["problem"] = now.problem;
  return result;
}

std::optional<uint64_t> carveout_bytes() {
  const auto size = egm_carveout();
  return size ? std::optional<uint64_t>(size->count()) : std::nullopt;
}

// By the ways that the allocator itself uses.
// A thread that is bound binds nothing itself.
bool may_bind_memory() { return bound_nodes() || HostRange(mib(2)).prefer_node(0); }

bool may_ask_for_pages() {
  try {
    const char page = 0;
    page_nodes(&page, Bytes(1));
    return true;
  } catch (const std::system_error&) {
    return false;
  }
}

}  // namespace

void check_device(int device) {
  if (device < 0 || device >= kMaxDevices) {
    throw py::value_error("device is " + std::to_string(device) + "; allowed: 0 to " +
                          std::to_string(kMaxDevices - 1));
  }
}

void bind_machine(py::module_& module) {
  module.def("device_traits", &traits_of, py::arg("device"));
  module.def("choose_backing", &choice_for, py::arg("device"));
  module.def("host_memory", &host_memory_now);
  module.def("host_bookings", &host_bookings);
  module.def("egm_carveout", &carveout_bytes);
  module.def("read_kernel_file", &read_text, py::arg("path"));
  module.def("host_total", &host_total);
  module.def("may_bind_memory", &may_bind_memory);
  module.def("may_ask_for_pages", &may_ask_for_pages);
}

}  // namespace egm
