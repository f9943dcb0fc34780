// Where the segments of one of our pools come from.
#include "torch/segment_source.h"

#include <utility>

#include "core/state.h"
#include "cuda/errors.h"
#include "cuda/host_books.h"
#include "cuda/host_reserve.h"

namespace egm {

ReadySegment::ReadySegment(const Request& request, const Placement& placement)
    : size_(request.size) {
  HintFailures none;
  base_ = acquire_segment(request, placement, SegmentOwner::kTorch, &none);
}

ReadySegment::~ReadySegment() {
  if (base_ != nullptr) release_segment(base_);
}

void* ReadySegment::take(size_t nbytes) {
  return size_.count() < nbytes ? nullptr : std::exchange(base_, nullptr);
}

// It does not wait for host memory, as everybody would who waits for torch's lock.
void* SegmentSource::raw_alloc(size_t nbytes) {
  Diversion unattended;
  Diversion* const current = this_thread().diversion;
  Diversion& diversion = current != nullptr ? *current : unattended;
  try {
    HintFailures hints;
    void* base = diversion.ready ? diversion.ready->take(nbytes) : nullptr;
    if (base == nullptr) {
      // The one call into torch: statistics, under the lock that this thread holds.
      if (placement_.backing == BackingKind::kManaged) tell_hbm_of_torch(*target(), device_);
      const Request request{Bytes(nbytes), device_, diversion.stream};
      base = acquire_segment(request, placement_, SegmentOwner::kTorch, &hints, &kAtOnce);
    }
    ++segments_;
    diversion.missed = true;
    if (!hints.advice.empty()) diversion.report().advice_failure = std::move(hints.advice);
    if (!hints.prefetch.empty()) diversion.report().prefetch_failure = std::move(hints.prefetch);
    return base;
  } catch (const std::exception& error) {
    auto& problems = diversion.report();
    problems.failure = error.what();
    problems.refusal = refusal_of(error);
    const auto* const over = dynamic_cast<const ReserveExceeded*>(&error);
    problems.may_pass = over != nullptr && over->may_pass();
    return nullptr;
  }
}

void tell_hbm_of_torch(cca::CUDAAllocator& native, c10::DeviceIndex device) {
  constexpr auto kAll = static_cast<size_t>(c10::CachingAllocator::StatType::AGGREGATE);
  const Bytes reserved(
      static_cast<uint64_t>(native.getDeviceStats(device).reserved_bytes[kAll].current));
  const auto& ledger = state().ledger;
  // With what the C pair gave to pools of the user's.
  const Bytes extended = ledger.reserved_outside_hbm(device) +
                         ledger.counters(device, BackingKind::kManaged).pair_allocated;
  see_hbm(device, difference_or_zero(reserved, extended));
}

void SegmentSource::raw_delete(void* ptr) {
  if (release_segment(ptr)) --segments_;
}

}  // namespace egm
