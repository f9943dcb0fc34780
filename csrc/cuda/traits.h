// What a device says about itself, asked by attributes alone: no context is made.
#pragma once

#include "core/auto_backing.h"
#include "core/units.h"

namespace egm {

// Throws CudaError.
DeviceTraits device_traits(DeviceIndex device);

// What backing "auto" means on a device. Asked once, for it does not change. Throws CudaError.
BackingKind auto_backing(DeviceIndex device);

}  // namespace egm
