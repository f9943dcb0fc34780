// The mapped ranges that exist, and which devices may reach whose.
#pragma once

#include <cuda_runtime_api.h>

#include <atomic>
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

// What of the range that begins there is in HBM, and what on the host; nothing if none does.
struct RangeParts {
  Bytes on_device;
  Bytes on_host;
};
std::optional<RangeParts> range_parts(const void* base);

// See MappedRange::set_device_part. Waits for the device first; no stream of it may be capturing.
// Host memory that it takes is asked of the reserve, and ReserveExceeded thrown with everything as
// it was; `give_up` as in HostClaim.
Bytes set_device_part(void* base, Bytes device_part, const std::atomic<bool>* give_up = nullptr);

}  // namespace egm
