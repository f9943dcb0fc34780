// Memory of the host NUMA node next to the GPU, mapped by the driver: the documented way to a
// carve-out of Extended GPU Memory, which the kernel does not own.
#include "cuda/backing.h"
#include "cuda/mapped_ranges.h"

namespace egm {
namespace {

class NumaBacking final : public Backing {
 public:
  Acquired acquire(Bytes size, DeviceIndex device, const Placement&) override {
    Acquired acquired;
    acquired.base = new_range(size, Bytes(0), SplitLayout::kSpread, device);
    return acquired;
  }

  cudaError_t release(const Segment& segment) noexcept override { return free_range(segment.base); }
  bool waits_on_release() const override { return false; }
};

}  // namespace

Backing& numa_backing() {
  static NumaBacking* const instance = new NumaBacking;
  return *instance;
}

}  // namespace egm
