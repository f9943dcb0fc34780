// The mapped ranges that exist, and which devices may reach whose.
#pragma once

#include <cuda_runtime_api.h>

#include <optional>

#include "core/config.h"
#include "core/units.h"

namespace egm {

// The base of a new range; throws CudaError.
void* new_range(Bytes size, Bytes device_part, SplitLayout layout, DeviceIndex device);
// The caller has waited for what uses it. On failure the range is still there, and may be freed
// again.
cudaError_t free_range(void* base) noexcept;

// `reader` may use the memory of `owner` from now on, in ranges there are and in later ones. Throws
// CudaError if one of those there are cannot be granted; the next call tries that again.
void allow_peer(DeviceIndex reader, DeviceIndex owner);

// What of the range that begins there is in HBM; nothing if none does.
std::optional<Bytes> device_part(const void* base);
// Whether set_device_part would move nothing.
bool has_device_part(const void* base, Bytes device_part);
// See MappedRange::set_device_part. Waits for the device first; no stream of it may be capturing.
Bytes set_device_part(void* base, Bytes device_part);

}  // namespace egm
