// Where the segments of one of our pools come from.
#include "torch/segment_source.h"

#include <utility>

#include "cuda/segments.h"

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

void* SegmentSource::raw_alloc(size_t nbytes) {
  Diversion unattended;
  Diversion* const current = this_thread().diversion;
  Diversion& diversion = current != nullptr ? *current : unattended;
  try {
    HintFailures hints;
    void* base = diversion.ready ? diversion.ready->take(nbytes) : nullptr;
    if (base == nullptr) {
      const Request request{Bytes(nbytes), device_, diversion.stream};
      base = acquire_segment(request, placement_, SegmentOwner::kTorch, &hints);
    }
    ++segments_;
    diversion.missed = true;
    if (!hints.advice.empty()) diversion.report().advice_failure = std::move(hints.advice);
    if (!hints.prefetch.empty()) diversion.report().prefetch_failure = std::move(hints.prefetch);
    return base;
  } catch (const std::exception& error) {
    diversion.report().failure = error.what();
    return nullptr;
  }
}

void SegmentSource::raw_delete(void* ptr) {
  if (release_segment(ptr)) --segments_;
}

}  // namespace egm
