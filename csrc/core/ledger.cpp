// Counters and peaks of the extended tier.
#include "core/ledger.h"

#include <algorithm>

namespace egm {

template <typename Change>
void Ledger::change(DeviceIndex device, BackingKind backing, Change&& change) {
  std::lock_guard<std::mutex> lock(mutex_);
  change(devices_.at(device).at(static_cast<size_t>(backing)));
}

bool Ledger::try_reserve(DeviceIndex device, BackingKind backing, Bytes size,
                         std::optional<Bytes> limit) {
  std::lock_guard<std::mutex> lock(mutex_);
  Device& counters = devices_.at(device);
  if (limit) {
    Bytes reserved;
    for (const auto& c : counters) reserved = reserved + c.reserved;
    if (reserved > *limit || size > *limit - reserved) return false;
  }
  auto& c = counters.at(static_cast<size_t>(backing));
  c.reserved = c.reserved + size;
  return true;
}

void Ledger::cancel_reservation(DeviceIndex device, BackingKind backing, Bytes size) {
  change(device, backing, [&](BackingCounters& c) { c.reserved = c.reserved - size; });
}

void Ledger::segment_acquired(DeviceIndex device, BackingKind backing) {
  change(device, backing, [](BackingCounters& c) {
    ++c.segments;
    ++c.segment_allocs;
    c.reserved_peak = std::max(c.reserved_peak, c.reserved);
  });
}

void Ledger::segment_released(DeviceIndex device, BackingKind backing, Bytes size) {
  change(device, backing, [&](BackingCounters& c) {
    c.reserved = c.reserved - size;
    --c.segments;
    ++c.segment_frees;
  });
}

void Ledger::mapped_in_hbm_changed(DeviceIndex device, Bytes before, Bytes after) {
  std::lock_guard<std::mutex> lock(mutex_);
  Bytes& sum = mapped_in_hbm_.at(device);
  sum = sum - before + after;
}

void Ledger::pair_allocated(DeviceIndex device, BackingKind backing, Bytes size) {
  change(device, backing, [&](BackingCounters& c) {
    ++c.pair_mallocs;
    c.pair_allocated = c.pair_allocated + size;
  });
}

void Ledger::pair_freed(DeviceIndex device, BackingKind backing, Bytes size) {
  change(device, backing, [&](BackingCounters& c) {
    ++c.pair_frees;
    c.pair_allocated = c.pair_allocated - size;
  });
}

void Ledger::prefetched(DeviceIndex device, BackingKind backing, bool failed) {
  change(device, backing, [&](BackingCounters& c) {
    ++c.prefetches;
    if (failed) ++c.prefetch_failures;
  });
}

void Ledger::advice_failed(DeviceIndex device, BackingKind backing, uint64_t count) {
  change(device, backing, [&](BackingCounters& c) { c.advice_failures += count; });
}

void Ledger::refused_by_limit(DeviceIndex device, BackingKind backing) {
  change(device, backing, [](BackingCounters& c) { ++c.limit_refusals; });
}

void Ledger::refused_by_reserve(DeviceIndex device, BackingKind backing) {
  change(device, backing, [](BackingCounters& c) { ++c.reserve_refusals; });
}

void Ledger::spilled(DeviceIndex device, BackingKind backing) {
  change(device, backing, [](BackingCounters& c) { ++c.spills; });
}

BackingCounters Ledger::counters(DeviceIndex device, BackingKind backing) const {
  std::lock_guard<std::mutex> lock(mutex_);
  BackingCounters counters = devices_.at(device).at(static_cast<size_t>(backing));
  counters.allocations =
      counters.pair_mallocs + served_.at(device).at(static_cast<size_t>(backing)).load();
  return counters;
}

Bytes Ledger::reserved(DeviceIndex device) const {
  std::lock_guard<std::mutex> lock(mutex_);
  Bytes reserved;
  for (const auto& c : devices_.at(device)) reserved = reserved + c.reserved;
  return reserved;
}

Bytes Ledger::reserved_outside_hbm(DeviceIndex device) const {
  std::lock_guard<std::mutex> lock(mutex_);
  const Device& counters = devices_.at(device);
  Bytes sum;
  for (const BackingKind kind : kAllBackings) {
    const auto& c = counters.at(static_cast<size_t>(kind));
    if (kind != BackingKind::kDevice) sum = sum + c.reserved - c.pair_allocated;
  }
  // Its chunks are rounded up.
  return difference_or_zero(sum, mapped_in_hbm_.at(device));
}

void Ledger::reset_peaks(DeviceIndex device) {
  std::lock_guard<std::mutex> lock(mutex_);
  for (auto& c : devices_.at(device)) c.reserved_peak = c.reserved;
}

}  // namespace egm
