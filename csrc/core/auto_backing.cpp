// Which backing suits a device.
#include "core/auto_backing.h"

namespace egm {
namespace {

Choice without_managed(const DeviceTraits& traits) {
  if (traits.registered_host_pointers) {
    return {BackingKind::kPinned,
            "this GPU cannot use managed memory while the CPU does; pinned host memory has no such "
            "limit"};
  }
  if (traits.host_numa_vmm) {
    return {BackingKind::kNuma,
            "this GPU cannot use managed memory while the CPU does, nor pinned host memory at its "
            "own address; the driver can map memory of the host's NUMA node"};
  }
  return {BackingKind::kManaged,
          "this GPU offers nothing else beyond HBM; the CPU must not touch it while the GPU works"};
}

}  // namespace

// The first that fits. A carve-out comes before the link, because nothing else reaches that memory.
Choice choose_backing(const DeviceTraits& traits) {
  if (traits.egm_carveout && traits.host_numa_vmm) {
    return {BackingKind::kNuma,
            "the firmware sets host memory aside for the GPU (EGM), and the kernel does not own "
            "that memory; only mappings of the host's NUMA node reach it"};
  }
  if (!traits.managed || !traits.concurrent_managed_access) return without_managed(traits);
  if (traits.integrated) {
    return {BackingKind::kManaged,
            "CPU and GPU share one memory, so nothing has to move between them"};
  }
  if (traits.pageable_memory_access && traits.uses_host_page_tables) {
    return {BackingKind::kManaged,
            "the GPU uses the host's page tables over a coherent link; it reaches pages on the "
            "host without faults, and they can migrate to HBM"};
  }
  if (traits.registered_host_pointers) {
    return {BackingKind::kPinned,
            "host memory is behind PCIe, where managed pages fault and push each other out of HBM; "
            "pinned memory does neither and is read at the speed of the link"};
  }
  return {BackingKind::kManaged,
          "this GPU cannot use pinned host memory at its own address; managed memory works, with "
          "page faults"};
}

}  // namespace egm
