// Whether host memory can be had without cutting into the reserve, beside what this process and
// others have booked. The arithmetic is in core/reserve.h, what processes know of each other in
// core/process_table.h.
#pragma once

#include <atomic>
#include <functional>
#include <optional>
#include <set>
#include <string>

#include "core/placement.h"
#include "core/segment_table.h"
#include "core/units.h"
#include "cuda/managed_promise.h"

namespace egm {

struct NoRoom;

// For `give_up`, of who does not wait at all.
inline const std::atomic<bool> kAtOnce{true};

// Host memory of a segment that is about to be acquired, booked until it is there: until then the
// kernel does not count it.
class HostClaim {
 public:
  // Throws ReserveExceeded with everything as it was. Not while it would fit but for requests that
  // are under way, of this process or another, which are counted twice the more of them is
  // populated: it waits for those first, at most a minute, or until `give_up` is set by somebody.
  HostClaim(const Request& request, const Placement& placement,
            const std::atomic<bool>* give_up = nullptr);
  // For managed memory that exists and is to go to the host, now or when it is used.
  explicit HostClaim(const ManagedRange& range);
  ~HostClaim();
  // Waits as the above does, and claims nothing.
  static void wait_for_room(const Request& request, const Placement& placement);
  // The memory is there: the claim has become what it takes of the host's node by cuMemCreate, or
  // what a managed segment has promised.
  void settle(Bytes of_node, const Segment* managed = nullptr);
  HostClaim(const HostClaim&) = delete;
  HostClaim& operator=(const HostClaim&) = delete;

 private:
  explicit HostClaim(DeviceIndex device) : device_(device) {}
  // `book` is one of those below.
  template <typename Book>
  static std::optional<NoRoom> when_possible(const std::atomic<bool>* give_up, const Book& book);
  std::optional<NoRoom> book(const Request& request, const Placement& placement);
  // `managed` says how much more of it would be promised; where there is none, `on_host` is asked.
  using Promised = std::function<Bytes(ManagedPromise&)>;
  std::optional<NoRoom> book(Bytes on_host, bool may_be_of_carveout, const Promised& managed);
  // Under the mutex and in the turn of `book`.
  std::optional<NoRoom> book_of_carveout(Bytes asked, Bytes carveout);

  // What the stock of this thread has given since, and had booked.
  Bytes passed_by_stock() const noexcept;

  const DeviceIndex device_;
  Bytes pending_;
  Bytes carveout_;
};

// For a claim on memory of the host's node.
Placement on_host_node();

// NUMA nodes that are GPU memory.
std::set<int> hbm_nodes();

}  // namespace egm
