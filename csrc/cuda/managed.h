// What can be asked of managed memory that exists: advice and prefetching.
#pragma once

#include <cuda_runtime_api.h>

#include <optional>

#include "core/config.h"
#include "cuda/managed_promise.h"

namespace egm {

// What to change; what is empty stays as it is.
struct AdviceChange {
  // Set, or with no location unset.
  std::optional<std::optional<Location>> preferred_location;
  std::optional<bool> accessed_by_device;
  std::optional<bool> accessed_by_host;
  std::optional<bool> read_mostly;
};

// Both act on whole pages and throw CudaError; what was changed before the failure stays changed.
// What sends pages to the host is asked of the reserve first, and ReserveExceeded thrown with
// everything as it was. Prefetching throws std::runtime_error where it would break a capture.
void advise_managed(const ManagedRange& range, const AdviceChange& change);
void prefetch_managed(const ManagedRange& range, Location to, cudaStream_t stream,
                      DeviceIndex stream_device);

}  // namespace egm
