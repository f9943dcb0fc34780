// Managed memory (cudaMallocManaged) with advice and prefetch.
#include "cuda/managed.h"

#include <array>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>

#include "cuda/backing.h"
#include "cuda/errors.h"
#include "cuda/guards.h"
#include "cuda/host_books.h"
#include "cuda/host_reserve.h"

namespace egm {
namespace {

cudaMemLocation to_cuda(Location location, DeviceIndex device) {
  cudaMemLocation result{};
  if (location == Location::kDevice) {
    result.type = cudaMemLocationTypeDevice;
    result.id = device;
  } else {
    result.type = cudaMemLocationTypeHost;
    result.id = cudaCpuDeviceId;
  }
  return result;
}

class ManagedBacking final : public Backing {
 public:
  // The steps and their order are those of the malloc/free pair that users have today: attach
  // global, preferred location, accessed by, prefetch.
  Acquired acquire(Bytes size, DeviceIndex device, const Placement& placement) override {
    Acquired acquired;
    check(cudaMallocManaged(&acquired.base, size.count(), cudaMemAttachGlobal), "cudaMallocManaged",
          size, device);
    // From here on nothing throws: `acquired.base` is raw.
    const Advice& advice = placement.advice;
    if (advice.preferred_location) {
      advise(acquired, size, cudaMemAdviseSetPreferredLocation, *advice.preferred_location, device);
    }
    if (advice.accessed_by_device) {
      advise(acquired, size, cudaMemAdviseSetAccessedBy, Location::kDevice, device);
    }
    if (advice.accessed_by_host) {
      advise(acquired, size, cudaMemAdviseSetAccessedBy, Location::kHost, device);
    }
    if (placement.prefetch) prefetch(acquired, size, device);
    return acquired;
  }

  // cudaFree waits for kernels that may use the memory, and for a prefetch underway.
  cudaError_t release(const Segment& segment) noexcept override { return cudaFree(segment.base); }

 private:
  static void advise(Acquired& acquired, Bytes size, cudaMemoryAdvise advice, Location location,
                     DeviceIndex device) noexcept {
    const cudaError_t status =
        cudaMemAdvise(acquired.base, size.count(), advice, to_cuda(location, device));
    if (status == cudaSuccess) return;
    cudaGetLastError();
    ++acquired.advice_failures;
    acquired.advice_status = status;
  }

  void prefetch(Acquired& acquired, Bytes size, DeviceIndex device) noexcept {
    cudaStream_t stream = nullptr;
    cudaError_t status = stream_of(device, &stream);
    if (status == cudaSuccess) {
      status = cudaMemPrefetchAsync(acquired.base, size.count(), to_cuda(Location::kDevice, device),
                                    0, stream);
    }
    if (status != cudaSuccess) cudaGetLastError();
    acquired.prefetched = status == cudaSuccess;
    acquired.prefetch_status = status;
  }

  // A stream of our own: work on the legacy stream would be an error while another thread
  // captures, and would order itself behind everything the user runs.
  cudaError_t stream_of(DeviceIndex device, cudaStream_t* stream) noexcept {
    std::lock_guard<std::mutex> lock(mutex_);
    cudaStream_t& own = streams_[static_cast<size_t>(device)];
    if (own == nullptr) {
      const cudaError_t status = cudaStreamCreateWithFlags(&own, cudaStreamNonBlocking);
      if (status != cudaSuccess) {
        own = nullptr;
        return status;
      }
    }
    *stream = own;
    return cudaSuccess;
  }

  std::mutex mutex_;
  // Never destroyed: at process exit the driver may already be gone.
  std::array<cudaStream_t, kMaxDevices> streams_{};
};

// It captures, or is the legacy stream while one captures that it would wait for.
bool is_closed_by_capture(cudaStream_t stream) {
  cudaStreamCaptureStatus capturing = cudaStreamCaptureStatusNone;
  const cudaError_t status = cudaStreamIsCapturing(stream, &capturing);
  if (status != cudaSuccess) cudaGetLastError();
  return capturing != cudaStreamCaptureStatusNone || status == cudaErrorStreamCaptureImplicit;
}

}  // namespace

Backing& managed_backing() {
  static ManagedBacking* const instance = new ManagedBacking;
  return *instance;
}

void advise_managed(const ManagedRange& range, const AdviceChange& change) {
  RelaxedCaptureScope relaxed;
  const auto advise = [&](cudaMemoryAdvise advice, Location location) {
    check(cudaMemAdvise(range.address, range.size.count(), advice, to_cuda(location, range.device)),
          "cudaMemAdvise", range.size, range.device);
  };
  const auto set_or_unset = [&](const std::optional<bool>& wanted, cudaMemoryAdvise set,
                                cudaMemoryAdvise unset, Location location) {
    if (wanted) advise(*wanted ? set : unset, location);
  };
  if (change.preferred_location) {
    const auto& location = *change.preferred_location;
    const bool on_host = location == Location::kHost;
    const auto claim = on_host ? std::make_unique<HostClaim>(range) : nullptr;
    advise(location ? cudaMemAdviseSetPreferredLocation : cudaMemAdviseUnsetPreferredLocation,
           location.value_or(Location::kDevice));
    rebook_advised(range, on_host);
  }
  set_or_unset(change.accessed_by_device, cudaMemAdviseSetAccessedBy, cudaMemAdviseUnsetAccessedBy,
               Location::kDevice);
  set_or_unset(change.accessed_by_host, cudaMemAdviseSetAccessedBy, cudaMemAdviseUnsetAccessedBy,
               Location::kHost);
  set_or_unset(change.read_mostly, cudaMemAdviseSetReadMostly, cudaMemAdviseUnsetReadMostly,
               Location::kDevice);
}

void prefetch_managed(const ManagedRange& range, Location to, cudaStream_t stream,
                      DeviceIndex stream_device) {
  // Each device has a null stream of its own, and the current one's is meant.
  DeviceScope scope(stream_device);
  RelaxedCaptureScope relaxed;
  if (is_closed_by_capture(stream)) {
    throw std::runtime_error("memory cannot be moved on a stream of device " +
                             std::to_string(stream_device) + " during a CUDA graph capture");
  }
  const auto claim = to == Location::kHost ? std::make_unique<HostClaim>(range) : nullptr;
  check(
      cudaMemPrefetchAsync(range.address, range.size.count(), to_cuda(to, range.device), 0, stream),
      "cudaMemPrefetchAsync", range.size, range.device);
  rebook_prefetched(range, to);
}

}  // namespace egm
