// What a device says about itself, asked by attributes alone: no context is made.
#pragma once

#include "core/auto_backing.h"
#include "core/units.h"

namespace egm {

// A cudaDeviceAttr, or one of the driver's that has no name in the runtime. Throws CudaError.
int device_attribute(int attribute, DeviceIndex device);

// The NUMA node that is the device's memory, or -1; only coherent machines show one. Throws
// CudaError.
int hbm_numa_node(DeviceIndex device);

// Throws CudaError.
DeviceTraits device_traits(DeviceIndex device);

// What backing "auto" means on a device. Asked once, for it does not change. Throws CudaError.
BackingKind auto_backing(DeviceIndex device);

}  // namespace egm
