// One way to get memory. A backing knows CUDA and nothing of counters, limits or torch.
//
// Contract, for every backing:
// - The caller has relaxed the thread's capture mode: any thread may be capturing a graph. For
//   acquire() it has also made `device` current; release() works whatever device is.
// - acquire() returns at least `size` bytes aligned to 512 or throws CudaError, holding nothing.
//   Failed hints are not failures: they are counted in the result.
// - release() never throws; on failure the memory is still held and the status says why. If
//   `waits_on_release`, it returns once no running kernel can still touch the memory, as cudaFree
//   does; else the caller has waited for the segment's stream.
#pragma once

#include <cuda_runtime_api.h>

#include "core/placement.h"
#include "core/segment_table.h"
#include "core/units.h"

namespace egm {

struct Acquired {
  void* base = nullptr;
  bool prefetched = false;
  unsigned advice_failures = 0;
  cudaError_t advice_status = cudaSuccess;
  cudaError_t prefetch_status = cudaSuccess;
};

class Backing {
 public:
  virtual Acquired acquire(Bytes size, DeviceIndex device, const Placement& placement) = 0;
  virtual cudaError_t release(const Segment& segment) noexcept = 0;
  virtual bool waits_on_release() const { return true; }

  Backing(const Backing&) = delete;
  Backing& operator=(const Backing&) = delete;

 protected:
  Backing() = default;
  // Backings live for the whole process and are never deleted.
  ~Backing() = default;
};

Backing& backing_of(BackingKind kind);

// One per file: managed.cpp, device.cpp, pinned.cpp, numa.cpp, split.cpp.
Backing& managed_backing();
Backing& device_backing();
Backing& pinned_backing();
Backing& numa_backing();
Backing& split_backing();

}  // namespace egm
