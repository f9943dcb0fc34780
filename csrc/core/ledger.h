// Counters and peaks of the extended tier, per device and backing.
// Pure bookkeeping; it neither allocates nor decides.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <mutex>
#include <optional>

#include "core/config.h"
#include "core/units.h"

namespace egm {

struct BackingCounters {
  Bytes reserved;               // SUM: bytes of live segments
  Bytes reserved_peak;          // the most `reserved` has been since the last reset
  Bytes pair_allocated;         // SUM: bytes handed out by the C pair, within `reserved`
  uint64_t segments = 0;        // COUNT: live segments
  uint64_t segment_allocs = 0;  // COUNT: segments ever acquired
  uint64_t segment_frees = 0;   // COUNT: segments ever released
  uint64_t allocations = 0;     // COUNT: requests ever served (torch's and the pair's)
  uint64_t pair_mallocs = 0;    // COUNT: blocks ever handed out by the C pair
  uint64_t pair_frees = 0;      // COUNT: and freed through it
  uint64_t prefetches = 0;
  uint64_t prefetch_failures = 0;
  uint64_t advice_failures = 0;
  uint64_t limit_refusals = 0;
  uint64_t reserve_refusals = 0;
  uint64_t spills = 0;  // COUNT: requests that HBM could not hold
};

class Ledger {
 public:
  // Books `size` as reserved unless that would put the device's extended tier above `limit`.
  // Every success is followed by exactly one of segment_acquired and cancel_reservation.
  bool try_reserve(DeviceIndex device, BackingKind backing, Bytes size, std::optional<Bytes> limit);
  void cancel_reservation(DeviceIndex device, BackingKind backing, Bytes size);
  void segment_acquired(DeviceIndex device, BackingKind backing);
  void segment_released(DeviceIndex device, BackingKind backing, Bytes size);
  // What mapped memory (numa, split) has in HBM, within `reserved`.
  void mapped_in_hbm_changed(DeviceIndex device, Bytes before, Bytes after);

  void request_served(DeviceIndex device, BackingKind backing) {
    served_.at(device).at(static_cast<size_t>(backing)).fetch_add(1, std::memory_order_relaxed);
  }
  void pair_allocated(DeviceIndex device, BackingKind backing, Bytes size);
  void pair_freed(DeviceIndex device, BackingKind backing, Bytes size);
  void prefetched(DeviceIndex device, BackingKind backing, bool failed);
  void advice_failed(DeviceIndex device, BackingKind backing, uint64_t count);
  void refused_by_limit(DeviceIndex device, BackingKind backing);
  void refused_by_reserve(DeviceIndex device, BackingKind backing);
  void spilled(DeviceIndex device, BackingKind backing);

  BackingCounters counters(DeviceIndex device, BackingKind backing) const;
  // Over all backings.
  Bytes reserved(DeviceIndex device) const;
  // What torch's allocator holds of memory that is not HBM.
  Bytes reserved_outside_hbm(DeviceIndex device) const;
  void reset_peaks(DeviceIndex device);

 private:
  using Device = std::array<BackingCounters, kBackingKinds>;

  template <typename Change>
  void change(DeviceIndex device, BackingKind backing, Change&& change);

  mutable std::mutex mutex_;
  std::array<Device, kMaxDevices> devices_{};
  std::array<Bytes, kMaxDevices> mapped_in_hbm_{};
  // Apart and without the mutex, because every diverted request counts here.
  std::array<std::array<std::atomic<uint64_t>, kBackingKinds>, kMaxDevices> served_{};
};

}  // namespace egm
