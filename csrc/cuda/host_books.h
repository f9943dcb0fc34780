// What this process has booked of host memory, and what happens to it besides claims
// (host_reserve.h). Only seeing HBM calls CUDA.
#pragma once

#include <sys/types.h>

#include <cstddef>
#include <mutex>
#include <optional>
#include <string>

#include "core/process_table.h"
#include "core/segment_table.h"
#include "core/units.h"
#include "cuda/managed_promise.h"

namespace egm {

// The mutex is held while it is decided about a claim, so that two threads do not both get the last
// of it. Leaf lock.
struct Books {
  explicit Books(pid_t process) : process(process) {}

  const pid_t process;
  std::mutex mutex;
  // As the others know it, but for what `publish` has not been called for yet.
  Booking own;
  ManagedPromise promise;
  ProcessTable table;
  bool refreshing = false;
};

Books& books();

// Under the mutex: tells the other processes; in a turn if it is more than before.
void publish(Books& all) noexcept;
// Under the mutex: asks the kernel how far managed memory is on the host.
void ask_about_promise(Books& all);

// After memory of the host's node is given back: what it held of the carve-out is free.
void unbook_node(Bytes released) noexcept;
// Before a claim: by what the device's HBM holds now, torch's allocator `of_torch` with its cache,
// managed memory is promised what that leaves no room for.
void see_hbm(DeviceIndex device, Bytes of_torch);
// The same for the pair where torch's allocator does not run and tells nothing.
void see_hbm_without_torch(DeviceIndex device);
// After a managed segment is gone: so is its promise.
void unbook_managed(const Segment& segment) noexcept;
// After a range of one was advised or prefetched: the promise is another. What may make it more has
// been claimed, and the claim ends after this.
void rebook_advised(const ManagedRange& range, bool prefers_host);
void rebook_prefetched(const ManagedRange& range, Location to);

// What is booked of host memory now.
struct Bookings {
  Bytes promised;  // by this process, to managed memory
  Booking others;  // by all others together
  size_t other_processes = 0;
  // Why other processes are not seen, if they are not.
  std::optional<std::string> problem;
};
Bookings bookings();

}  // namespace egm
