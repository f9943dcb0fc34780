// Copies that the driver does not give to the GPU.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>

#include "core/units.h"

namespace egm {

// Copies bytes by a kernel on a device's stream. From registered host memory to registered host
// memory the driver copies by the CPU, whatever the call: it waits for the stream first, and takes
// five times as long. Throws what torch throws if the launch fails.
void copy_by_kernel(void* dst, const void* src, size_t count, DeviceIndex device,
                    cudaStream_t stream);

}  // namespace egm
