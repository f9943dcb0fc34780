// How a failed CUDA call becomes an exception: with its name, the size, the device and what to do.
#pragma once

#include <cuda_runtime_api.h>

#include <stdexcept>
#include <string>

#include "core/units.h"

namespace egm {

class CudaError : public std::runtime_error {
 public:
  CudaError(const std::string& message, cudaError_t status)
      : std::runtime_error(message), status_(status) {}
  cudaError_t status() const noexcept { return status_; }

 private:
  cudaError_t status_;
};

// Host memory would fall below the reserve (Config::host_reserve).
class ReserveExceeded : public std::runtime_error {
 public:
  ReserveExceeded(const std::string& message, bool may_pass)
      : std::runtime_error(message), may_pass_(may_pass) {}
  // It would fit once the requests that are under way are served.
  bool may_pass() const noexcept { return may_pass_; }

 private:
  bool may_pass_;
};

// The extended tier's ceiling (Config::limit) does not leave room for a segment.
class LimitExceeded : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// "cudaErrorMemoryAllocation (out of memory)"
std::string describe(cudaError_t status);

// "3.00 GiB (3221225472 bytes)"
std::string describe(Bytes size);

// What to do about it, without the full stop.
const char* remedy(cudaError_t status);

// Clears the runtime's error state and throws CudaError unless `status` is cudaSuccess. torch
// checks cudaGetLastError before its next allocation and would report our error as its own.
void check(cudaError_t status, const char* call, Bytes size, DeviceIndex device);

}  // namespace egm
