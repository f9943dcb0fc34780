// The decision for one request: where its memory comes from. Pure functions.
#pragma once

#include <optional>

#include "core/config.h"
#include "core/units.h"

namespace egm {

struct Request {
  Bytes size;
  DeviceIndex device = 0;
};

// A backing and its advice. Segments of equal placement are interchangeable and share pools.
struct Placement {
  BackingKind backing = BackingKind::kManaged;
  Advice advice;
  bool prefetch = false;

  friend bool operator==(const Placement& a, const Placement& b) {
    return a.backing == b.backing && a.advice == b.advice && a.prefetch == b.prefetch;
  }
};

// The extended tier's placement, or nothing: the request stays in the device tier.
std::optional<Placement> place(const Request& request, const Config& config);

// The smallest request that `place` sends to the extended tier.
Bytes smallest_extended(const Config& config);

// Which pool of a placement serves a request: torch's best fit has no upper bound, so a small
// request could be cut from a huge cached block, which then cannot be returned. Below 1 GiB all
// sizes share pool 0, as they do in torch; above, there is one pool per power of two.
int size_class(Bytes size);
inline constexpr Bytes kEndOfClassZero = gib(1);

}  // namespace egm
