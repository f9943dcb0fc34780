// What managed memory may still take of the host when it is populated. The arithmetic is in
// core/reserve.h; here it meets the devices and the segments.
#pragma once

#include "core/placement.h"
#include "core/units.h"

namespace egm {

// All managed memory of the request's device fits in its HBM, the request included, which the
// ledger has booked already. Quick, where asking each segment is not.
bool stays_within_hbm(const Request& request, const Placement& placement);

// To all managed segments of this process; and to `request` besides, which is not among them yet.
// HBM that torch holds otherwise is what the device's last managed request said of it.
struct ManagedPromise {
  Bytes segments;
  Bytes request;
};
ManagedPromise managed_promise(const Request* request = nullptr,
                               const Placement* placement = nullptr);

}  // namespace egm
