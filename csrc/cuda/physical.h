// Physical memory of the driver's, in HBM or on the host's NUMA node next to a GPU (CUDA Driver
// API, "Virtual Memory Management"). mapped_range.h gives it addresses.
#pragma once

#include <cuda.h>

#include <optional>

#include "core/units.h"

namespace egm {

// Where physical memory is to be.
struct Site {
  DeviceIndex device;
  bool on_device;
  // Of memory on the host.
  int host_node = 0;
};

// Throws CudaError where the driver cannot map memory of a host node.
int host_node_of(DeviceIndex device);

// Sizes and addresses of what is in HBM, and on a host node if there is one, are multiples of it.
// Throws CudaError.
Bytes granularity_of(DeviceIndex device, std::optional<int> host_node);

// The driver's lock is not fair: while one thread asks for host memory without a pause, others that
// need the driver, and whoever waits for them, wait far longer than one request takes.
class DriverPauses {
 public:
  // Called after each request, with its size: makes way for others now and then.
  void after(Bytes taken);

 private:
  Bytes since_last_;
};

// Physical memory until it is mapped, or for the time it is held.
class Physical {
 public:
  // Throws CudaError.
  Physical(Bytes size, const Site& site);
  explicit Physical(CUmemGenericAllocationHandle handle) : handle_(handle) {}
  ~Physical();
  Physical(const Physical&) = delete;
  Physical& operator=(const Physical&) = delete;

  CUmemGenericAllocationHandle handle() const { return handle_; }
  // The caller's from now on.
  CUmemGenericAllocationHandle leave() noexcept;

 private:
  CUmemGenericAllocationHandle handle_ = 0;
};

}  // namespace egm
