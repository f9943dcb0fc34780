// The decision for one request: where its memory comes from. Pure functions.
#pragma once

#include <optional>

#include "core/config.h"
#include "core/units.h"

namespace egm {

struct Request {
  Bytes size;
  DeviceIndex device = 0;
  // The CUDA stream that asks; null for the legacy one.
  void* stream = nullptr;
};

// A backing and its advice. Segments of equal placement are interchangeable and share pools.
struct Placement {
  BackingKind backing = BackingKind::kManaged;
  Advice advice;
  bool prefetch = false;
  // Split: the part in HBM, where it lies, and the size that the pool is for: a split segment is
  // one block.
  double device_fraction = 0;
  SplitLayout layout = SplitLayout::kSpread;
  Bytes exact_size;
  // Serves what HBM could not hold.
  bool spilled = false;
  // Of the innermost place(); 0 where it has none, even within one that has.
  int tag = 0;

  friend bool operator==(const Placement& a, const Placement& b) {
    return a.backing == b.backing && a.advice == b.advice && a.prefetch == b.prefetch &&
           a.device_fraction == b.device_fraction && a.layout == b.layout &&
           a.exact_size == b.exact_size && a.spilled == b.spilled && a.tag == b.tag;
  }
};

// What a block of code asked for (place() in Python), before the configuration.
struct PlaceScope {
  // Nothing for "auto".
  std::optional<BackingKind> backing = BackingKind::kManaged;
  double device_fraction = 0;
  SplitLayout layout = SplitLayout::kSpread;
  int tag = 0;
  // Smaller requests are placed as outside of all place() blocks.
  Bytes min_bytes;
};

// Says what backing "auto" means on a device; asked only where it is wanted.
using AutoBacking = BackingKind (*)(DeviceIndex device);

// The extended tier's placement, or nothing: the request stays in the device tier. `scope` may be
// null.
std::optional<Placement> place(const Request& request, const Config& config,
                               const PlaceScope* scope, AutoBacking auto_backing);

// Where a request goes that HBM could not hold, if it may go anywhere.
std::optional<Placement> spill_placement(const Request& request, const Config& config,
                                         AutoBacking auto_backing);

// The smallest request that `place` sends to the extended tier outside of scopes.
Bytes smallest_extended(const Config& config);

// In host memory that the GPU reads over the link.
inline bool is_on_host(BackingKind kind) {
  return kind == BackingKind::kPinned || kind == BackingKind::kNuma;
}
// Takes long to bring up: 44 ms/GiB and more, where managed and device memory take none.
inline bool is_slow_to_bring_up(BackingKind kind) {
  return is_on_host(kind) || kind == BackingKind::kSplit;
}

// The part of `size` that a split placement has in HBM.
Bytes device_share(Bytes size, double device_fraction);
// The part that takes host memory at once.
Bytes host_share(Bytes size, const Placement& placement);
// The part that is not of HBM: that, and managed memory wherever it may be.
Bytes extended_share(Bytes size, const Placement& placement);

// torch packs smaller requests into segments that they share, and a split segment is for one.
inline constexpr Bytes kLeastSplit = mib(10);

// Which pool of a placement serves a request: torch's best fit has no upper bound, so a small
// request could be cut from a huge cached block, which then cannot be returned. Below 1 GiB all
// sizes share pool 0, as they do in torch; above, there is one pool per power of two.
int size_class(Bytes size);
inline constexpr Bytes kEndOfClassZero = gib(1);

}  // namespace egm
