// What is done around a request: bringing memory up before it, giving memory back after it. Which
// requests are diverted is in tiered_allocator.cpp.
#include <c10/core/AllocatorConfig.h>
#include <c10/cuda/CUDAFunctions.h>

#include <stdexcept>
#include <utility>

#include "core/state.h"
#include "cuda/errors.h"
#include "cuda/guards.h"
#include "cuda/host_reserve.h"
#include "cuda/mapped_ranges.h"
#include "torch/thread_scopes.h"
#include "torch/tiered_allocator.h"

namespace egm {

namespace {

using TorchConfig = c10::CachingAllocator::AcceleratorAllocatorConfig;

// The setting large_segment_size_mb, of which development versions know nothing.
template <typename Config>
auto large_segment(int) -> decltype(Bytes(Config::large_segment_size())) {
  return Bytes(Config::large_segment_size());
}
template <typename Config>
Bytes large_segment(...) {
  return mib(20);
}

CudaError with_moved(const CudaError& error, Bytes moved) {
  return CudaError(
      std::string(error.what()) + " " + describe(moved) + " had moved before, and stay moved.",
      error.status());
}

}  // namespace

// The block that torch makes of a request (round_size in c10/cuda/CUDACachingAllocator.cpp), by the
// setting roundup_power2_divisions: up to the next of so many equal steps between two powers of
// two.
Bytes TieredAllocator::block_size(Bytes request) {
  constexpr Bytes kLeast(512);
  const uint64_t size = request.count();
  const uint64_t steps = TorchConfig::roundup_power2_divisions(size);
  if (steps < 2 || size <= 512 * steps) return round_up(request, kLeast);
  uint64_t power = 1;
  while (power <= size / 2) power *= 2;
  const uint64_t step = power / steps;
  return round_up(request, step == 0 ? kLeast : Bytes(step));
}

// The segment that torch asks for if its cache misses (get_allocation_size there).
Bytes TieredAllocator::segment_size(Bytes request) {
  constexpr Bytes kRounding = mib(2);
  const Bytes size = block_size(request);
  if (size <= mib(1)) return kRounding;
  if (size < mib(10)) return large_segment<TorchConfig>(0);
  return round_up(size, kRounding);
}

// Before the gate and torch's lock, under which it would hold up every other thread. If it cannot
// be had, what is cached is given back for it; then it is out of memory, before torch is asked.
void TieredAllocator::bring_up(Device& own, const Request& request, const Config& config,
                               const Placement& placement, Diversion& diversion) {
  const Request segment{segment_size(request.size), request.device, diversion.stream};
  {
    GateScope gate(own.gate);
    const Pool& pool = own.pools.live(placement, request.size);
    const auto stream = static_cast<cudaStream_t>(diversion.stream);
    if (own.pools.has_cached(pool, block_size(request.size), stream)) return;
    // Before it is tried: only what is not served counts as refused.
    if (exceeds_limit(own, segment.size, config)) give_back_cached(own);
  }
  tell_hbm_of_torch();
  try {
    diversion.ready = std::make_unique<ReadySegment>(segment, placement);
    return;
  } catch (const LimitExceeded& error) {
    refuse(own.index, placement, Refusal::kByLimit, error.what());
  } catch (const std::runtime_error&) {
    give_back_everywhere();
  }
  try {
    diversion.ready = std::make_unique<ReadySegment>(segment, placement);
  } catch (const std::runtime_error& error) {
    refuse(own.index, placement, refusal_of(error), error.what());
  }
}

void TieredAllocator::tell_hbm_of_torch() {
  const auto count = c10::cuda::device_count();
  for (c10::DeviceIndex index = 0; index < count; ++index) {
    if (state().ledger.counters(index, BackingKind::kManaged).reserved == Bytes(0)) continue;
    egm::tell_hbm_of_torch(*target(), index);
  }
}

// HBM may be cached by torch too, and memory of the host by any device. Other threads may capture.
void TieredAllocator::give_back_everywhere() {
  {
    RelaxedCaptureScope relaxed;
    emptyCache();
  }
  tell_hbm_of_torch();
}

Bytes TieredAllocator::move(void* base, Bytes device_part) {
  const auto on_device = [base] { return range_parts(base).value_or(RangeParts{}).on_device; };
  const Bytes before = on_device();
  const auto moved = [&] {
    const Bytes after = on_device();
    return after > before ? after - before : before - after;
  };
  try {
    return set_device_part(base, device_part);
  } catch (const CudaError& error) {
    if (error.status() != cudaErrorMemoryAllocation) throw with_moved(error, moved());
  } catch (const ReserveExceeded&) {
  }
  give_back_everywhere();
  try {
    set_device_part(base, device_part);
  } catch (const CudaError& error) {
    throw with_moved(error, moved());
  }
  return moved();
}

// A cached split segment may have been migrated by its last user. The request is served; should the
// boundary not move back, the tensor is only slower or faster than it was to be.
void TieredAllocator::restore_device_part(Device& own, const Placement& placement,
                                          const void* served) {
  const auto segment = state().segments.find(served);
  if (!segment || own.recordings.any()) return;
  try {
    set_device_part(segment->base, device_share(segment->size, placement.device_fraction),
                    &kAtOnce);
  } catch (const std::runtime_error&) {
    // HBM or the host is short of it.
  }
}

// Served from HBM again while spilled memory is held: once nothing was spilled for so many
// requests, what has become free of it is given back to the host. The number is arbitrary: some
// training steps that spill keep what they spill to.
void TieredAllocator::after_spill() {
  constexpr unsigned kRequests = 1024;
  if (++served_since_spill_ % kRequests != 0) return;
  // First: another thread may spill meanwhile.
  holds_spilled_ = false;
  bool held = false;
  const auto count = c10::cuda::device_count();
  for (c10::DeviceIndex index = 0; index < count; ++index) {
    Device& own = device(index);
    GateScope gate(own.gate);
    if (!own.pools.any_spilled()) continue;
    if (!own.recordings.any()) {
      own.pools.retire([](const Pool& pool) { return pool.placement.spilled; });
      own.pools.empty_retired();
    }
    held = held || own.pools.any_spilled();
  }
  if (held) holds_spilled_ = true;
}

// torch 2.11 and 2.12 look whether recorded streams have finished only in an allocation outside of
// any recording. In mode "managed" there might be none, and blocks would pile up.
void TieredAllocator::process_pending_events(Device& own, cudaStream_t stream) {
  try {
    QuietScope quiet(this_thread(), true);
    target()->raw_delete(target()->raw_alloc_with_stream(512, stream));
  } catch (const c10::OutOfMemoryError&) {
    // HBM is full; the events were looked at all the same, and nobody has asked for these bytes.
    ++own.quiet_failures;
  }
}

// Under the gate. A miss is the time to give back what retired pools have cached since. The request
// is served or has failed already; nothing here may change that.
void TieredAllocator::tidy_after_diversion(Device& own, const Diversion& diversion) noexcept {
  try {
    own.fraction.allow_extended(Bytes(0));
    if (own.recordings.any()) return;
    if (!own.postponed_empties.empty()) empty_postponed(own);
    if (diversion.missed && own.pools.any_retired()) own.pools.empty_retired();
  } catch (const std::exception&) {
    // What was not given back is tried again next time.
  }
}

// Under the gate. What our pools have cached in HBM; torch then frees its own cache itself.
void TieredAllocator::give_back_hbm(Device& own) {
  bool any = false;
  own.pools.retire([&](const Pool& pool) {
    const bool cached = own.pools.has_cached_hbm(pool);
    any = any || cached;
    return cached;
  });
  if (any) empty_retired(own);
}

// Under the gate.
void TieredAllocator::give_back_cached(Device& own) {
  own.pools.retire_all();
  empty_retired(own);
}

// Under the gate.
void TieredAllocator::empty_retired(Device& own) {
  if (own.recordings.any()) {
    // The one call that torch 2.11 and 2.12 allow beside a recording of somebody else's.
    target()->emptyCache({0, 0});
    own.pools.note_forgotten();
  } else {
    own.pools.empty_retired();
  }
}

// Under the gate.
void TieredAllocator::empty_postponed(Device& own) {
  own.pools.stop_recording();
  for (const auto& id : std::exchange(own.postponed_empties, {})) target()->emptyCache(id);
}

void TieredAllocator::refuse(c10::DeviceIndex index, const Placement& placement, Refusal refusal,
                             const std::string& why) {
  count_refusal(index, placement.backing, refusal);
  C10_THROW_ERROR(OutOfMemoryError, "CUDA out of memory. " + describe_tiers(index, why));
}

std::string TieredAllocator::describe_tiers(c10::DeviceIndex index, const std::string& failure) {
  const Bytes extended = state().ledger.reserved(index);
  std::string text = "egm_alloc: on device " + std::to_string(index) +
                     " torch holds in the device tier " + describe(report(index).device_reserved) +
                     " and in the extended tier " + describe(extended);
  if (const auto limit = state().config.get().limit) text += " of a limit of " + describe(*limit);
  if (!failure.empty()) text += "; " + failure;
  return text;
}

}  // namespace egm
