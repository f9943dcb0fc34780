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

// How much host memory a device's managed memory may still take when it is populated: all of what
// prefers the host, and of the rest what HBM cannot hold beside `hbm_reserved_otherwise`.
Bytes promised_to_host(Bytes managed_prefers_host_unpopulated, Bytes managed_other_total,
                       Bytes managed_other_unpopulated, Bytes hbm_reserved_otherwise,
                       Bytes hbm_total);

}  // namespace egm
