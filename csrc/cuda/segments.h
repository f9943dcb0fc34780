// Acquiring and releasing segments: the limit, the counters and the table of segments around a
// backing. Used alike by torch's segment sources and by the C pair.
#pragma once

#include <atomic>
#include <exception>
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
// ReserveExceeded with everything as it was. The thread's current device and capture mode are kept.
// `give_up` as in HostClaim.
void* acquire_segment(const Request& request, const Placement& placement, SegmentOwner owner,
                      HintFailures* hints, const std::atomic<bool>* give_up = nullptr);

// What kept a request from its memory; for the counters, which count requests and not tries.
enum class Refusal { kNone, kByLimit, kByReserve };
Refusal refusal_of(const std::exception& error);
void count_refusal(DeviceIndex device, BackingKind backing, Refusal refusal);

// Releases the segment that starts at `base`; false if there is none. If a stream capture forbids
// it just now, the memory stays booked and is released by a later call of any of these functions.
bool release_segment(void* base) noexcept;
void release_postponed() noexcept;

}  // namespace egm
