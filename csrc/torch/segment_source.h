// Where the segments of one of our pools come from: torch calls raw_alloc when its cache misses and
// raw_delete when it gives a segment back.
//
// Both run with torch's device lock held: here are leaf locks only, no Python, no logging, no call
// into torch. What goes wrong is left in the thread's Diversion and told when that is over.
#pragma once

#include <atomic>
#include <memory>
#include <string>

#include "core/placement.h"
#include "cuda/segments.h"
#include "torch/delegating_allocator.h"
#include "torch/this_thread.h"

namespace egm {

struct Pool;

// A segment that was brought up before torch was asked, since torch asks for one with its device
// lock held. Released unless it is taken.
class ReadySegment {
 public:
  // Throws what acquire_segment throws.
  ReadySegment(const Request& request, const Placement& placement);
  ~ReadySegment();
  ReadySegment(const ReadySegment&) = delete;
  ReadySegment& operator=(const ReadySegment&) = delete;

  // Its base if it has room for `nbytes` and was not taken yet, else null.
  void* take(size_t nbytes);

 private:
  void* base_ = nullptr;
  Bytes size_;
};

// The diversion that the current thread is in. torch's allocator asks about it through the filter
// of a recording.
struct Diversion {
  size_t nbytes = 0;
  // Where to; null for any pool whose recording is open for requests of this size.
  const Pool* pool = nullptr;
  // False while an observer's own request passes through.
  bool claims = true;
  // The device where a recording took the request, or -1.
  int claimed_on = -1;
  void* stream = nullptr;
  // Null for backings that are up at once.
  std::unique_ptr<ReadySegment> ready;
  // A segment was acquired: the cache had missed.
  bool missed = false;

  struct Problems {
    // Why no segment could be had.
    std::string failure;
    Refusal refusal = Refusal::kNone;
    // It may fit once requests that are under way are served.
    bool may_pass = false;
    // Hints that failed; the memory is fine.
    std::string advice_failure;
    std::string prefetch_failure;
    // torch refused to end a recording.
    std::string pool_failure;
  };
  bool wants(const Pool& candidate) const;

  // Null while there are none, as nearly always.
  std::unique_ptr<Problems> problems;

  Problems& report() {
    if (!problems) problems = std::make_unique<Problems>();
    return *problems;
  }
};

// Tells how much HBM torch's allocator holds on a device, for the promise of managed memory there.
void tell_hbm_of_torch(cca::CUDAAllocator& native, c10::DeviceIndex device);

class SegmentSource final : public DelegatingAllocator {
 public:
  SegmentSource(cca::CUDAAllocator* native, c10::DeviceIndex device, const Placement& placement)
      : DelegatingAllocator(native), device_(device), placement_(placement) {}

  // Null on failure, with the CUDA error cleared: torch then reports out of memory.
  void* raw_alloc(size_t nbytes) override;
  void* raw_alloc_with_stream(size_t nbytes, cudaStream_t) override { return raw_alloc(nbytes); }
  // Never throws.
  void raw_delete(void* ptr) override;

  // Segments that torch holds from here.
  size_t segments() const { return segments_.load(); }

 private:
  const c10::DeviceIndex device_;
  const Placement placement_;
  std::atomic<size_t> segments_{0};
};

}  // namespace egm
