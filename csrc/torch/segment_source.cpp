// Where the segments of one of our pools come from.
#include "torch/segment_source.h"

#include "cuda/segments.h"

namespace egm {

void* SegmentSource::raw_alloc(size_t nbytes) {
  Diversion unattended;
  Diversion* const current = this_thread().diversion;
  Diversion& diversion = current != nullptr ? *current : unattended;
  try {
    HintFailures hints;
    void* const base =
        acquire_segment(Request{Bytes(nbytes), device_}, placement_, SegmentOwner::kTorch, &hints);
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
