// Plain device memory (cudaMalloc), for extended pools that should stay in HBM.
#include "cuda/backing.h"
#include "cuda/errors.h"

namespace egm {
namespace {

class DeviceBacking final : public Backing {
 public:
  Acquired acquire(Bytes size, DeviceIndex device, const Placement&) override {
    Acquired acquired;
    check(cudaMalloc(&acquired.base, size.count()), "cudaMalloc", size, device);
    return acquired;
  }

  // cudaFree waits for kernels that may use the memory.
  cudaError_t release(const Segment& segment) noexcept override { return cudaFree(segment.base); }
};

}  // namespace

Backing& device_backing() {
  static DeviceBacking* const instance = new DeviceBacking;
  return *instance;
}

}  // namespace egm
