// Acquiring and releasing segments: the limit, the counters and the table of segments around a
// backing. Used alike by torch's segment sources and by the C pair.
#pragma once

#include <string>

#include "core/placement.h"
#include "core/segment_table.h"
#include "core/units.h"

namespace egm {

// A hint that failed while the memory itself is fine; empty when there was none.
struct HintFailures {
  std::string advice;
  std::string prefetch;
};

// Returns the base of a new segment of `request.size` bytes. Throws CudaError, LimitExceeded or
// ReserveExceeded with
// everything as it was. The thread's current device and capture mode are kept.
void* acquire_segment(const Request& request, const Placement& placement, SegmentOwner owner,
                      HintFailures* hints);

// Releases the segment that starts at `base`; false if there is none. If a stream capture forbids
// it just now, the memory stays booked and is released by a later call of any of these functions.
bool release_segment(void* base) noexcept;
void release_postponed() noexcept;

}  // namespace egm
