// What backing "auto" means on a device. Pure; the device is asked in cuda/traits.h.
#pragma once

#include "core/config.h"

namespace egm {

// What a device says about itself and about the memory around it; see the attributes of the same
// names in the CUDA Runtime API. Nothing is known of a device by default.
struct DeviceTraits {
  // Managed memory at all; and while the CPU uses it too.
  bool managed = false;
  bool concurrent_managed_access = false;
  // The GPU reaches all of the host's memory; and by the host's page tables: a coherent link
  // (NVLink-C2C).
  bool pageable_memory_access = false;
  bool uses_host_page_tables = false;
  // One memory for CPU and GPU.
  bool integrated = false;
  // The driver can map memory of a host NUMA node (backings `numa` and `split`).
  bool host_numa_vmm = false;
  // Registered host memory has one address for CPU and GPU (backing `pinned`).
  bool registered_host_pointers = false;
  // The nodes of the kernel: that of the host next to the GPU, and that of the GPU's memory; -1 for
  // none.
  int host_numa_node = -1;
  int hbm_numa_node = -1;
  // Host memory was set aside for the GPU in the firmware (Extended GPU Memory).
  bool egm_carveout = false;
};

struct Choice {
  BackingKind backing;
  // Sentences for the user, without a capital and without the last full stop.
  const char* reason;
};

Choice choose_backing(const DeviceTraits& traits);

}  // namespace egm
