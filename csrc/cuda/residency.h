// Where the bytes of an address range are now, asked from the driver and the kernel, not from our
// own books.
#pragma once

#include "core/units.h"

namespace egm {

struct Residency {
  // "managed", "device", "host" or "unregistered" (CUDA Runtime API, cudaPointerGetAttributes).
  const char* memory_type = "unregistered";
  // On a NUMA node of the host.
  Bytes host;
  // On the NUMA node that is this device's memory; only coherent machines show one.
  Bytes device_node;
  // Not mapped for the CPU. Of managed memory on a PCIe machine: in HBM, or not populated yet.
  Bytes unmapped;
};

Residency residency(const void* address, Bytes size, DeviceIndex device);

}  // namespace egm
