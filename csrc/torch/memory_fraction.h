// torch.cuda.set_per_process_memory_fraction, kept to the device tier.
//
// torch counts our segments against the fraction, so HBM requests would fail or flush their cache
// for memory that is not in HBM. While there are such segments, torch's allocator is given a
// fraction larger by their share; the user is answered with the user's own. Memory that the C pair
// gives a pool of the user's is not made room for.
#pragma once

#include <atomic>
#include <mutex>
#include <optional>

#include "core/units.h"
#include "torch/delegating_allocator.h"

namespace egm {

class MemoryFraction {
 public:
  MemoryFraction(cca::CUDAAllocator* native, c10::DeviceIndex device)
      : native_(native), device_(device) {}

  // Throws what torch throws for a value out of range, with everything as it was.
  void set(double fraction);
  double get();
  bool unlimited() const { return unlimited_.load(std::memory_order_relaxed); }
  // Makes room for the segments outside HBM that there are and `coming` more bytes of them.
  void allow_extended(Bytes coming);

 private:
  cca::CUDAAllocator* const native_;
  const c10::DeviceIndex device_;
  std::mutex mutex_;
  // Nothing is to be done: the user's fraction is known and is no limit.
  std::atomic<bool> unlimited_{false};
  // The user's; nothing until it is known.
  std::optional<double> fraction_;
  // What torch's allocator was last given.
  double applied_ = 1.0;
};

}  // namespace egm
