// The exported C pair. It has no Python to warn through, so problems are lines on stderr.
#include "c_api/pair.h"

#include <cstdio>
#include <exception>
#include <string>

#include "c_api/egm_alloc.h"
#include "core/state.h"
#include "cuda/errors.h"
#include "cuda/guards.h"
#include "cuda/host_reserve.h"
#include "cuda/segments.h"

namespace {

using egm::Bytes;

egm::Placement pair_placement(Bytes size) {
  const egm::Config& config = egm::state().config.get();
  egm::Placement placement;
  placement.backing = egm::BackingKind::kManaged;
  placement.advice = config.advice;
  placement.prefetch = config.prefetch && size < config.threshold;
  return placement;
}

void report(const std::string& problem, const char* consequence) {
  if (problem.empty()) return;
  std::fprintf(stderr, "[managed_alloc] %s (%s)\n", problem.c_str(), consequence);
}

}  // namespace

void* egm::pair_malloc(size_t size, int device, const std::atomic<bool>* give_up) {
  if (size == 0) return nullptr;
  try {
    if (device < 0 || device >= egm::kMaxDevices) {
      throw egm::CudaError("cudaSetDevice(" + std::to_string(device) + ") failed: invalid device",
                           cudaErrorInvalidDevice);
    }
    const egm::Request request{Bytes(size), device};
    const egm::Placement placement = pair_placement(request.size);
    egm::HintFailures hints;
    void* const base =
        egm::acquire_segment(request, placement, egm::SegmentOwner::kPair, &hints, give_up);
    egm::state().ledger.pair_allocated(device, placement.backing, request.size);
    report(hints.advice, "the memory is usable, without this advice");
    report(hints.prefetch, "will use on-demand migration");
    return base;
  } catch (const std::exception& error) {
    egm::count_refusal(device, egm::BackingKind::kManaged, egm::refusal_of(error));
    report(error.what(), "returning null");
    return nullptr;
  }
}

extern "C" {

#define EGM_ALLOC_EXPORT __attribute__((visibility("default")))

EGM_ALLOC_EXPORT void* managed_malloc(size_t size, int device, cudaStream_t) {
  // A pool calls it under torch's lock.
  return egm::pair_malloc(size, device, &egm::kAtOnce);
}

EGM_ALLOC_EXPORT void managed_free(void* ptr, size_t, int, cudaStream_t stream) {
  if (ptr == nullptr) return;
  try {
    const auto segment = egm::state().segments.find(ptr);
    if (!segment || segment->base != ptr || segment->owner != egm::SegmentOwner::kPair) {
      report("managed_free: not a pointer from managed_malloc", "ignored");
      return;
    }
    if (stream != nullptr) {
      // Page faults in flight must not race with the release. A stream that captures cannot be
      // waited for, and has nothing in flight.
      egm::RelaxedCaptureScope relaxed;
      cudaStreamCaptureStatus capturing = cudaStreamCaptureStatusNone;
      if (cudaStreamIsCapturing(stream, &capturing) == cudaSuccess &&
          capturing == cudaStreamCaptureStatusNone) {
        const cudaError_t status = cudaStreamSynchronize(stream);
        if (status != cudaSuccess) {
          report("cudaStreamSynchronize failed with " + egm::describe(status), "freeing anyway");
        }
      }
      cudaGetLastError();
    }
    egm::state().ledger.pair_freed(segment->device, segment->placement.backing, segment->size);
    egm::release_segment(ptr);
  } catch (const std::exception& error) {
    report(error.what(), "not freed");
  }
}

}  // extern "C"
