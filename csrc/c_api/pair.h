// The pair's malloc, for callers that may wait.
#pragma once

#include <atomic>
#include <cstddef>

namespace egm {

// As managed_malloc. `give_up` as in HostClaim.
void* pair_malloc(size_t size, int device, const std::atomic<bool>* give_up);

}  // namespace egm
