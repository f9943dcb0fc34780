// Acquiring and releasing segments.
#include "cuda/segments.h"

#include <cuda_runtime_api.h>

#include <deque>
#include <mutex>
#include <optional>
#include <utility>

#include "core/state.h"
#include "cuda/backing.h"
#include "cuda/errors.h"
#include "cuda/guards.h"
#include "cuda/host_books.h"
#include "cuda/host_reserve.h"
#include "cuda/mapped_ranges.h"

namespace egm {
namespace {

// Segments whose release a capture has forbidden. A leaf lock; leaked like State.
struct Postponed {
  std::mutex mutex;
  std::deque<Segment> segments;
};

Postponed& postponed() {
  static Postponed* const instance = new Postponed;
  return *instance;
}

bool forbidden_by_capture(cudaError_t status) {
  return status == cudaErrorStreamCaptureUnsupported || status == cudaErrorStreamCaptureImplicit ||
         status == cudaErrorStreamCaptureInvalidated || status == cudaErrorStreamCaptureMerge ||
         status == cudaErrorStreamCaptureWrongThread;
}

// What cudaFree does by itself: waits until no running kernel can still touch the memory. On the
// stream that torch gave it to; for others torch has waited by recorded events.
cudaError_t wait_for_last_work(const Segment& segment) noexcept {
  const auto stream = static_cast<cudaStream_t>(segment.stream);
  cudaStreamCaptureStatus capturing = cudaStreamCaptureStatusNone;
  cudaError_t status = cudaStreamIsCapturing(stream, &capturing);
  // Waiting for it would break the capture.
  if (capturing != cudaStreamCaptureStatusNone) return cudaErrorStreamCaptureUnsupported;
  if (status == cudaSuccess) status = cudaStreamSynchronize(stream);
  if (status == cudaSuccess || forbidden_by_capture(status)) return status;
  // The stream may be gone, and its work still run.
  cudaGetLastError();
  return cudaDeviceSynchronize();
}

// Nothing, unless it is mapped by cuMemCreate.
RangeParts parts_of(const Segment& segment) {
  return range_parts(segment.base).value_or(RangeParts{});
}

cudaError_t wait_and_release(const Segment& segment) noexcept {
  Backing& backing = backing_of(segment.placement.backing);
  if (!backing.waits_on_release()) {
    try {
      DeviceScope device(segment.device);
      const cudaError_t status = wait_for_last_work(segment);
      if (forbidden_by_capture(status)) return status;
      // Nothing to wait for; torch would take it for an error of its own.
      if (status != cudaSuccess) cudaGetLastError();
    } catch (const CudaError& error) {
      return error.status();
    }
  }
  return backing.release(segment);
}

// True once the segment is gone for good. A failure other than a capture's means that the driver
// is shutting down or the context is lost: the memory is gone with it.
bool try_release(const Segment& segment) noexcept {
  RelaxedCaptureScope relaxed;
  const RangeParts parts = parts_of(segment);
  const cudaError_t status = wait_and_release(segment);
  if (status != cudaSuccess) cudaGetLastError();
  if (forbidden_by_capture(status)) return false;
  state().ledger.segment_released(segment.device, segment.placement.backing, segment.size);
  state().ledger.mapped_in_hbm_changed(segment.device, parts.on_device, Bytes(0));
  unbook_node(parts.on_host);
  if (segment.placement.backing == BackingKind::kManaged) unbook_managed(segment);
  return true;
}

void release_or_postpone(const Segment& segment) noexcept {
  if (try_release(segment)) return;
  auto& waiting = postponed();
  std::lock_guard<std::mutex> lock(waiting.mutex);
  waiting.segments.push_back(segment);
}

HintFailures book_hints(const Acquired& acquired, const Request& request,
                        const Placement& placement) {
  auto& ledger = state().ledger;
  HintFailures failures;
  const std::string where =
      " for " + describe(request.size) + " on device " + std::to_string(request.device);
  if (acquired.advice_failures > 0) {
    ledger.advice_failed(request.device, placement.backing, acquired.advice_failures);
    failures.advice = "cudaMemAdvise failed with " + describe(acquired.advice_status) + where;
  }
  if (placement.prefetch) {
    const bool failed = acquired.prefetch_status != cudaSuccess;
    ledger.prefetched(request.device, placement.backing, failed);
    if (failed) {
      failures.prefetch =
          "cudaMemPrefetchAsync failed with " + describe(acquired.prefetch_status) + where;
    }
  }
  return failures;
}

}  // namespace

void release_postponed() noexcept {
  auto& waiting = postponed();
  std::deque<Segment> segments;
  {
    std::lock_guard<std::mutex> lock(waiting.mutex);
    if (waiting.segments.empty()) return;
    segments.swap(waiting.segments);
  }
  for (const Segment& segment : segments) release_or_postpone(segment);
}

void* acquire_segment(const Request& request, const Placement& placement, SegmentOwner owner,
                      HintFailures* hints, const std::atomic<bool>* give_up) {
  release_postponed();
  auto& [config, ledger, segments] = state();
  const auto limit = config.get().limit;
  if (!ledger.try_reserve(request.device, placement.backing, request.size, limit)) {
    throw LimitExceeded("the extended tier's limit of " + describe(*limit) + " on device " +
                        std::to_string(request.device) + " leaves no room for " +
                        describe(request.size) + ": " + describe(ledger.reserved(request.device)) +
                        " are reserved. Raise limit_gib or free tensors.");
  }
  Acquired acquired;
  std::optional<HostClaim> claim;
  try {
    DeviceScope device(request.device);
    claim.emplace(request, placement, give_up);
    RelaxedCaptureScope relaxed;
    acquired = backing_of(placement.backing).acquire(request.size, request.device, placement);
  } catch (...) {
    ledger.cancel_reservation(request.device, placement.backing, request.size);
    throw;
  }
  Segment segment{acquired.base, request.size, request.device, placement, owner, request.stream};
  segment.placement.prefetch = acquired.prefetched;
  segments.insert(segment);
  const bool managed = placement.backing == BackingKind::kManaged;
  const RangeParts parts = parts_of(segment);
  claim->settle(parts.on_host, managed ? &segment : nullptr);
  ledger.mapped_in_hbm_changed(request.device, Bytes(0), parts.on_device);
  ledger.segment_acquired(request.device, placement.backing);
  *hints = book_hints(acquired, request, placement);
  return acquired.base;
}

Refusal refusal_of(const std::exception& error) {
  if (dynamic_cast<const LimitExceeded*>(&error) != nullptr) return Refusal::kByLimit;
  if (dynamic_cast<const ReserveExceeded*>(&error) != nullptr) return Refusal::kByReserve;
  return Refusal::kNone;
}

void count_refusal(DeviceIndex device, BackingKind backing, Refusal refusal) {
  if (refusal == Refusal::kByLimit) state().ledger.refused_by_limit(device, backing);
  if (refusal == Refusal::kByReserve) state().ledger.refused_by_reserve(device, backing);
}

bool release_segment(void* base) noexcept {
  release_postponed();
  const auto segment = state().segments.take(base);
  if (!segment) return false;
  release_or_postpone(*segment);
  return true;
}

}  // namespace egm
