// What managed memory may still take of the host. The arithmetic is in core/reserve.h; here it
// meets the devices and the segments.
#pragma once

#include <chrono>
#include <cstdint>
#include <map>
#include <optional>
#include <utility>
#include <vector>

#include "core/placement.h"
#include "core/reserve.h"
#include "core/segment_table.h"
#include "core/units.h"

namespace egm {

// Pages of a managed segment.
struct ManagedRange {
  void* address = nullptr;
  Bytes size;
  DeviceIndex device = 0;
};

// Of all managed memory of this process, kept as it comes and goes; how much of it is on the host
// is asked from the kernel now and then, because there may be much. Not for several threads at a
// time.
class ManagedPromise {
 public:
  void add(const Segment& segment);
  // Nothing happens if it was not added.
  void remove(const Segment& segment);

  // By what was last seen of the devices' HBM.
  Bytes total() const;
  // How much more `request` would make it.
  Bytes with(const Request& request, const Placement& placement) const;
  // How much more it would be with the range bound for the host. Asks about the range.
  Bytes with_on_host(const ManagedRange& range);
  void set_prefers_host(const ManagedRange& range, bool prefers);
  // By a prefetch. To the host: bound for it until it has been there, or some seconds are over.
  void set_moving(const ManagedRange& range, Location to);

  // What the driver shows of a device's HBM; nothing where it does not answer.
  struct View {
    DeviceIndex device = 0;
    Bytes total;
    Bytes free;
    int numa_node = -1;
  };
  static std::optional<View> look(DeviceIndex device) noexcept;
  // What of it torch's allocator holds is not known where nobody could ask torch.
  void see(const View& view, std::optional<Bytes> of_torch);
  // Whether torch's part was ever told: then it is left to who tells it.
  bool is_told_of_torch(DeviceIndex device) const;

  // Asks about all pages: what `apply` is told of those that are still there.
  struct Answer {
    uintptr_t address = 0;
    uint64_t number = 0;
    Bytes size;
    int hbm_node = -1;
    Bytes off_host;
  };
  std::vector<Answer> questions() const;
  static void ask(std::vector<Answer>& answers);
  void apply(const std::vector<Answer>& answers);

 private:
  using Clock = std::chrono::steady_clock;
  // Of a segment, what has been advised alike.
  struct Part {
    DeviceIndex device;
    Bytes size;
    bool prefers_host;
    // By a prefetch that may be queued behind other work.
    Clock::time_point moving_to_host_until;
    Bytes off_host;
    uint64_t number;  // tells it from a later one at the same address

    // Changes only where `change` is told, for sums are kept of it.
    bool moving_to_host() const { return moving_to_host_until != Clock::time_point(); }
    bool bound_for_host() const { return prefers_host || moving_to_host(); }
  };
  using Parts = std::map<uintptr_t, Part>;
  // Of a device.
  struct Sums {
    Bytes managed;
    // Of that, what is not on the host.
    Bytes bound_for_host;
    Bytes other;
    // As last seen.
    HbmUse hbm;
    Bytes hbm_of_others;
    bool is_told_of_torch = false;
    int numa_node = -1;

    Bytes& of(bool bound) { return bound ? bound_for_host : other; }
  };

  static Bytes promised(const Sums& sums);
  Answer question(const Parts::value_type& part) const;
  // From here to there after cutting parts at the ends of the range.
  std::pair<Parts::iterator, Parts::iterator> cut(const ManagedRange& range);
  void cut_at(uintptr_t address);
  template <typename Change>
  void change(Part& part, Change&& change);

  Parts parts_;
  std::map<DeviceIndex, Sums> sums_;
  uint64_t numbers_ = 0;
};

}  // namespace egm
