// Messages of failed CUDA calls.
#include "cuda/errors.h"

#include <iomanip>
#include <sstream>

namespace egm {
const char* remedy(cudaError_t status) {
  switch (status) {
    case cudaErrorMemoryAllocation:
      return "Free tensors, call torch.cuda.empty_cache(), or allocate less";
    case cudaErrorNotSupported:
      return "This device or driver lacks this kind of memory; choose another backing";
    case cudaErrorInsufficientDriver:
    case cudaErrorNoDevice:
      return "Check that nvidia-smi lists the GPU and that its driver supports CUDA 13";
    case cudaErrorInvalidDevice:
      return "Check that the device exists and has concurrent managed access";
    default:
      return "If it stays, report it with this message";
  }
}

std::string describe(cudaError_t status) {
  return std::string(cudaGetErrorName(status)) + " (" + cudaGetErrorString(status) + ")";
}

std::string describe(Bytes size) {
  std::ostringstream text;
  text << std::fixed << std::setprecision(2) << size.in_gib() << " GiB (" << size.count()
       << " bytes)";
  return text.str();
}

void check(cudaError_t status, const char* call, Bytes size, DeviceIndex device) {
  if (status == cudaSuccess) return;
  cudaGetLastError();
  throw CudaError(std::string(call) + " failed with " + describe(status) + " for " +
                      describe(size) + " on device " + std::to_string(device) + ". " +
                      remedy(status) + ".",
                  status);
}

}  // namespace egm
