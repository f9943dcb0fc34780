// Whether host memory can be had without cutting into the reserve. The arithmetic is in
// core/reserve.h; here it meets the devices and what is booked.
#pragma once

#include <set>

#include "core/placement.h"
#include "core/units.h"

namespace egm {

// Host memory of a segment that is about to be acquired, booked until it is populated: until then
// the kernel does not count it.
class HostClaim {
 public:
  // Throws ReserveExceeded with everything as it was.
  HostClaim(const Request& request, const Placement& placement);
  ~HostClaim();
  HostClaim(const HostClaim&) = delete;
  HostClaim& operator=(const HostClaim&) = delete;

 private:
  Bytes pending_;
};

// What managed memory that is not populated yet may still take of the host, on all devices.
Bytes promised_to_managed();

// NUMA nodes that are GPU memory.
std::set<int> hbm_nodes();

}  // namespace egm
