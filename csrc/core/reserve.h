// The reserve: host memory that must stay free. Pure arithmetic on what host_memory.h reads.
#pragma once

#include <optional>
#include <string>

#include "core/host_memory.h"
#include "core/units.h"

namespace egm {

struct ReserveQuestion {
  Bytes asked;     // by the request in question
  Bytes promised;  // to managed memory that is not populated yet: promised_to_host of all devices
  Bytes pending;   // to requests that are being served
  // The same of other processes.
  Bytes promised_elsewhere;
  Bytes pending_elsewhere;
  Bytes reserve;
  HostMemory host;
};

// Nothing if it fits: what is available is at least all of these together. Else the sentence for
// the error.
std::optional<std::string> over_reserve(const ReserveQuestion& question);

// 5 % of host memory.
Bytes default_reserve(Bytes total);

// HBM of a device as the driver shows it, and what of it torch's allocator holds.
struct HbmUse {
  Bytes total;
  Bytes free;
  Bytes of_torch;
};

// How much HBM is neither free nor torch's nor held by this process's managed memory, `managed`.
// The driver does not say how much of that is in HBM: nothing or all. So the last answer stays as
// far as it agrees with what is seen now; while there is no managed memory it is exact.
Bytes hbm_of_others(Bytes before, const HbmUse& hbm, Bytes managed);

// How much host memory a device's managed memory may still take: all that is bound for the host
// and not there yet, and of the rest that is not there what HBM cannot hold, free or resident
// already, because torch or others hold it.
Bytes promised_to_host(Bytes bound_for_host, Bytes other_off_host, const HbmUse& hbm,
                       Bytes of_others);

}  // namespace egm
