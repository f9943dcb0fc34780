// Host memory that never faults: huge pages brought up in parallel, then registered. That is up
// faster than cudaHostAlloc, which pins page by page in one thread (docs/memory-kinds.md).
#include <cuda_runtime_api.h>

#include <system_error>

#include "core/host_range.h"
#include "cuda/backing.h"
#include "cuda/errors.h"
#include "cuda/traits.h"

namespace egm {
namespace {

class PinnedBacking final : public Backing {
 public:
  Acquired acquire(Bytes size, DeviceIndex device, const Placement&) override {
    if (device_attribute(cudaDevAttrCanUseHostPointerForRegisteredMem, device) == 0) {
      throw CudaError("device " + std::to_string(device) +
                          " reaches registered host memory only under another address; use the "
                          "backing 'managed' or 'numa'",
                      cudaErrorNotSupported);
    }
    Acquired acquired;
    try {
      HostRange range(size);
      // A container may forbid it; then memory comes from the node of the thread that asks.
      range.prefer_node(device_attribute(cudaDevAttrHostNumaId, device));
      range.populate();
      check(cudaHostRegister(range.base(), size.count(),
                             cudaHostRegisterPortable | cudaHostRegisterMapped),
            "cudaHostRegister", size, device);
      acquired.base = range.leave();
    } catch (const std::system_error& error) {
      throw CudaError(std::string("host memory for ") + describe(size) + " on device " +
                          std::to_string(device) + " could not be had: " + error.what() + ". " +
                          remedy(cudaErrorMemoryAllocation) + ".",
                      cudaErrorMemoryAllocation);
    }
    return acquired;
  }

  cudaError_t release(const Segment& segment) noexcept override {
    const cudaError_t status = cudaHostUnregister(segment.base);
    if (status == cudaSuccess) free_host_range(segment.base, segment.size);
    return status;
  }

  bool waits_on_release() const override { return false; }
};

}  // namespace

Backing& pinned_backing() {
  static PinnedBacking* const instance = new PinnedBacking;
  return *instance;
}

}  // namespace egm
