// The driver functions that are used, looked up on first use: nothing links libcuda, so importing
// works where there is no driver.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include "core/units.h"

namespace egm {

// All of CUDA 13.0's driver at the latest.
struct Driver {
  decltype(&cuGetErrorName) error_name;
  decltype(&cuMemAddressReserve) address_reserve;
  decltype(&cuMemAddressFree) address_free;
  decltype(&cuMemCreate) create;
  decltype(&cuMemRelease) release;
  decltype(&cuMemRetainAllocationHandle) retain;
  decltype(&cuMemMap) map;
  decltype(&cuMemUnmap) unmap;
  decltype(&cuMemSetAccess) set_access;
  decltype(&cuMemGetAllocationGranularity) granularity;
};

// Throws CudaError if the driver lacks one of them.
const Driver& driver();

// The runtime's status of the same meaning, where one matters to a caller; else cudaErrorUnknown.
cudaError_t runtime_status(CUresult status);

// As check() in errors.h, for the driver's statuses.
void check(CUresult status, const char* call, Bytes size, DeviceIndex device);

}  // namespace egm
