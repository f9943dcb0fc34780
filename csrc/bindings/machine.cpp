// What the machine has, for Python.
#include "bindings/machine.h"

#include <optional>
#include <string>
#include <system_error>

#include "core/host_memory.h"
#include "core/host_range.h"
#include "core/kernel_files.h"
#include "core/page_nodes.h"
#include "cuda/traits.h"

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

std::optional<uint64_t> carveout_bytes() {
  const auto size = egm_carveout();
  return size ? std::optional<uint64_t>(size->count()) : std::nullopt;
}

// By the ways that the allocator itself uses.
bool may_bind_memory() { return HostRange(mib(2)).prefer_node(0); }

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
  module.def("egm_carveout", &carveout_bytes);
  module.def("read_kernel_file", &read_text, py::arg("path"));
  module.def("may_bind_memory", &may_bind_memory);
  module.def("may_ask_for_pages", &may_ask_for_pages);
}

}  // namespace egm
