// What managed memory may still take of the host when it is populated. The arithmetic is in
// core/reserve.h; here it meets the devices and the segments.
#pragma once

#include <cstdint>
#include <map>
#include <vector>

#include "core/placement.h"
#include "core/segment_table.h"
#include "core/units.h"

namespace egm {

// All managed memory of the request's device fits in its HBM, the request included, which the
// ledger has booked already. Takes no lock of a promise.
bool stays_within_hbm(const Request& request, const Placement& placement);

// Of all managed segments of this process, kept as they come and go; how far each is populated is
// asked from the kernel now and then, because there may be many. Not for several threads at a time.
class ManagedPromise {
 public:
  void add(const Segment& segment);
  // Nothing happens if it was not added.
  void remove(const Segment& segment);

  // HBM that torch holds otherwise is what the device's last managed request said of it.
  Bytes total() const;
  // How much more `request` would make it.
  Bytes with(const Request& request, const Placement& placement) const;

  // Asks about all segments: what `apply` is told of those that are still there.
  struct Answer {
    const void* base = nullptr;
    uint64_t number = 0;
    Bytes size;
    Bytes unpopulated;
  };
  std::vector<Answer> questions() const;
  static void ask(std::vector<Answer>& answers);
  void apply(const std::vector<Answer>& answers);

 private:
  // Of a device.
  struct Sums {
    Bytes prefers_host_unpopulated;
    Bytes other_total;
    Bytes other_unpopulated;
  };
  struct Known {
    Segment segment;
    Bytes unpopulated;
    uint64_t number = 0;  // tells it from a later one at the same address
  };

  static Bytes& unpopulated(Sums& sums, const Placement& placement);
  static void add(Sums& sums, Bytes size, const Placement& placement);
  static Bytes promised(DeviceIndex device, const Sums& sums);

  std::map<const void*, Known> known_;
  std::map<DeviceIndex, Sums> sums_;
  uint64_t numbers_ = 0;
};

}  // namespace egm
