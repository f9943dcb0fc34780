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

// HBM of a device as the driver shows it, what of it torch's allocator holds, and this process's
// managed memory of that device, wherever it is.
struct HbmUse {
  Bytes total;
  Bytes free;
  Bytes of_torch;
  Bytes managed;
};

// How much HBM is neither free nor torch's nor held by managed memory. The driver does not say how
// much of that is in HBM, none or all; so this is exact while there is none, and else what it was
// `before`, less what others must have given back since, as far as that agrees with what is seen
// `now`.
Bytes hbm_of_others(Bytes of_others, const HbmUse& before, const HbmUse& now);

// How much host memory a device's managed memory may still take: all that is bound for the host
// and not there yet, and of the rest that is not there what HBM cannot hold, free or resident
// already, because torch or others hold it.
Bytes promised_to_host(Bytes bound_for_host, Bytes other_off_host, const HbmUse& hbm,
                       Bytes of_others);

}  // namespace egm
