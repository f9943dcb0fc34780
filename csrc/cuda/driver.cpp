// Looking up the driver's functions, and its errors.
#include "cuda/driver.h"

#include <string>

#include "cuda/errors.h"

namespace egm {
namespace {

template <typename Function>
void look_up(Function& function, const char* name) {
  constexpr unsigned kVersion = 13000;
  void* found = nullptr;
  cudaDriverEntryPointQueryResult result{};
  const cudaError_t status =
      cudaGetDriverEntryPointByVersion(name, &found, kVersion, cudaEnableDefault, &result);
  if (status != cudaSuccess || result != cudaDriverEntryPointSuccess || found == nullptr) {
    cudaGetLastError();
    throw CudaError(std::string("this CUDA driver has no ") + name +
                        "; update the driver, or use another backing",
                    cudaErrorNotSupported);
  }
  function = reinterpret_cast<Function>(found);
}

Driver load() {
  Driver driver{};
  look_up(driver.error_name, "cuGetErrorName");
  look_up(driver.address_reserve, "cuMemAddressReserve");
  look_up(driver.address_free, "cuMemAddressFree");
  look_up(driver.create, "cuMemCreate");
  look_up(driver.release, "cuMemRelease");
  look_up(driver.retain, "cuMemRetainAllocationHandle");
  look_up(driver.map, "cuMemMap");
  look_up(driver.unmap, "cuMemUnmap");
  look_up(driver.set_access, "cuMemSetAccess");
  look_up(driver.granularity, "cuMemGetAllocationGranularity");
  return driver;
}

}  // namespace

const Driver& driver() {
  static const Driver loaded = load();
  return loaded;
}

cudaError_t runtime_status(CUresult status) {
  switch (status) {
    case CUDA_SUCCESS:
      return cudaSuccess;
    case CUDA_ERROR_OUT_OF_MEMORY:
      return cudaErrorMemoryAllocation;
    case CUDA_ERROR_NOT_SUPPORTED:
      return cudaErrorNotSupported;
    case CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED:
      return cudaErrorStreamCaptureUnsupported;
    case CUDA_ERROR_STREAM_CAPTURE_INVALIDATED:
      return cudaErrorStreamCaptureInvalidated;
    case CUDA_ERROR_STREAM_CAPTURE_MERGE:
      return cudaErrorStreamCaptureMerge;
    case CUDA_ERROR_STREAM_CAPTURE_IMPLICIT:
      return cudaErrorStreamCaptureImplicit;
    case CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD:
      return cudaErrorStreamCaptureWrongThread;
    default:
      return cudaErrorUnknown;
  }
}

void check(CUresult status, const char* call, Bytes size, DeviceIndex device) {
  if (status == CUDA_SUCCESS) return;
  const char* name = nullptr;
  if (driver().error_name(status, &name) != CUDA_SUCCESS || name == nullptr) name = "unknown";
  const cudaError_t meaning = runtime_status(status);
  throw CudaError(std::string(call) + " failed with " + name + " for " + describe(size) +
                      " on device " + std::to_string(device) + ". " + remedy(meaning) + ".",
                  meaning);
}

}  // namespace egm
