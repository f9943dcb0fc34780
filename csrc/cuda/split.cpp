// One range of addresses, in part in HBM and in part on the host. It runs at the speed of the link
// for the host's part alone, and parts can move while the address stays.
#include "cuda/backing.h"
#include "cuda/mapped_ranges.h"

namespace egm {
namespace {

class SplitBacking final : public Backing {
 public:
  Acquired acquire(Bytes size, DeviceIndex device, const Placement& placement) override {
    Acquired acquired;
    acquired.base =
        new_range(size, device_share(size, placement.device_fraction), placement.layout, device);
    return acquired;
  }

  cudaError_t release(const Segment& segment) noexcept override { return free_range(segment.base); }
  bool waits_on_release() const override { return false; }
};

}  // namespace

Backing& split_backing() {
  static SplitBacking* const instance = new SplitBacking;
  return *instance;
}

}  // namespace egm
