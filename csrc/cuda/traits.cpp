// Asking a device for its traits.
#include "cuda/traits.h"

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <array>
#include <atomic>

#include "core/host_memory.h"
#include "cuda/errors.h"

namespace egm {
namespace {

// By device: the BackingKind, or kUnknown. Leaked like State.
constexpr int kUnknown = -1;
using Known = std::array<std::atomic<int>, kMaxDevices>;

Known& known() {
  static Known* const instance = [] {
    auto* const all = new Known;
    for (auto& each : *all) each = kUnknown;
    return all;
  }();
  return *instance;
}

}  // namespace

int device_attribute(int attribute, DeviceIndex device) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, static_cast<cudaDeviceAttr>(attribute), device),
        "cudaDeviceGetAttribute", Bytes(0), device);
  return value;
}

int hbm_numa_node(DeviceIndex device) {
  const bool is_node =
      device_attribute(cudaDevAttrNumaConfig, device) == cudaDeviceNumaConfigNumaNode;
  return is_node ? device_attribute(cudaDevAttrNumaId, device) : -1;
}

DeviceTraits device_traits(DeviceIndex device) {
  const auto ask = [device](int attribute) { return device_attribute(attribute, device); };
  DeviceTraits traits;
  traits.managed = ask(cudaDevAttrManagedMemory);
  traits.concurrent_managed_access = ask(cudaDevAttrConcurrentManagedAccess);
  traits.pageable_memory_access = ask(cudaDevAttrPageableMemoryAccess);
  traits.uses_host_page_tables = ask(cudaDevAttrPageableMemoryAccessUsesHostPageTables);
  traits.integrated = ask(cudaDevAttrIntegrated);
  // The attribute is the driver's and has no name in the runtime.
  traits.host_numa_vmm = ask(CU_DEVICE_ATTRIBUTE_HOST_NUMA_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED);
  traits.registered_host_pointers = ask(cudaDevAttrCanUseHostPointerForRegisteredMem);
  traits.host_numa_node = ask(cudaDevAttrHostNumaId);
  traits.hbm_numa_node = hbm_numa_node(device);
  traits.egm_carveout = egm_carveout().has_value();
  return traits;
}

BackingKind auto_backing(DeviceIndex device) {
  auto& backing = known().at(static_cast<size_t>(device));
  int kind = backing.load(std::memory_order_relaxed);
  if (kind == kUnknown) {
    kind = static_cast<int>(choose_backing(device_traits(device)).backing);
    backing.store(kind, std::memory_order_relaxed);
  }
  return static_cast<BackingKind>(kind);
}

}  // namespace egm
