// Scopes that change a thread's state and put it back. They have no empty state.
#pragma once

#include <cuda_runtime_api.h>
#include <signal.h>

#include "core/units.h"
#include "cuda/errors.h"

namespace egm {

// Makes `device` current for a scope.
class DeviceScope {
 public:
  explicit DeviceScope(DeviceIndex device) {
    check(cudaGetDevice(&previous_), "cudaGetDevice", Bytes(0), device);
    if (previous_ == device) return;
    check(cudaSetDevice(device), "cudaSetDevice", Bytes(0), device);
    changed_ = true;
  }
  ~DeviceScope() {
    // What a thread does next would be done on the wrong device, so once more if it fails.
    for (int tries = 2; changed_ && tries > 0; --tries) {
      changed_ = cudaSetDevice(previous_) != cudaSuccess;
      if (changed_) cudaGetLastError();
    }
  }
  DeviceScope(const DeviceScope&) = delete;
  DeviceScope& operator=(const DeviceScope&) = delete;

 private:
  int previous_ = 0;
  bool changed_ = false;
};

// Threads that begin in its scope get no signals: the program's are for the program's threads.
class NoSignalsScope {
 public:
  NoSignalsScope() {
    sigset_t every;
    sigfillset(&every);
    pthread_sigmask(SIG_SETMASK, &every, &before_);
  }
  ~NoSignalsScope() { pthread_sigmask(SIG_SETMASK, &before_, nullptr); }
  NoSignalsScope(const NoSignalsScope&) = delete;
  NoSignalsScope& operator=(const NoSignalsScope&) = delete;

 private:
  sigset_t before_;
};

// Lets calls that a stream capture forbids go through while any thread may be capturing. They are
// not captured: an allocation is not stream work (CUDA Runtime API,
// cudaThreadExchangeStreamCaptureMode). Should the mode not change, the calls within say what is
// wrong.
class RelaxedCaptureScope {
 public:
  RelaxedCaptureScope() noexcept : relaxed_(exchange()) {}
  ~RelaxedCaptureScope() {
    // A thread left relaxed would break later captures unnoticed, so once more if it fails.
    if (relaxed_ && !exchange()) exchange();
  }
  RelaxedCaptureScope(const RelaxedCaptureScope&) = delete;
  RelaxedCaptureScope& operator=(const RelaxedCaptureScope&) = delete;

 private:
  bool exchange() noexcept {
    if (cudaThreadExchangeStreamCaptureMode(&mode_) == cudaSuccess) return true;
    cudaGetLastError();
    return false;
  }

  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
  const bool relaxed_;
};

}  // namespace egm
