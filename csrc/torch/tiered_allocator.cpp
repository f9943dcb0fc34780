// Which requests are diverted, and how; the rest of torch's interface is in tiered_interface.cpp.
#include "torch/tiered_allocator.h"

#include <c10/cuda/CUDAFunctions.h>
#include <c10/util/ScopeExit.h>

#include <utility>

#include "core/state.h"
#include "cuda/errors.h"
#include "torch/warnings.h"

namespace egm {
namespace {

// torch rounds segments above 10 MiB up to this (kRoundLarge in c10/cuda/CUDACachingAllocator.cpp).
constexpr uint64_t kSegmentRounding = 2ULL << 20;

Bytes segment_size(Bytes request) {
  return Bytes((request.count() + kSegmentRounding - 1) / kSegmentRounding * kSegmentRounding);
}

// Makes a diversion the current thread's for a scope.
class DiversionScope {
 public:
  explicit DiversionScope(Diversion& diversion) {
    diversion.claims = true;
    current_diversion() = &diversion;
  }
  ~DiversionScope() { current_diversion() = nullptr; }
  DiversionScope(const DiversionScope&) = delete;
  DiversionScope& operator=(const DiversionScope&) = delete;
};

// Lets a request of an observer, made in the midst of this thread's diversion, pass by our pool.
class PassByScope {
 public:
  explicit PassByScope(Diversion* diversion) : diversion_(diversion) {
    if (diversion_ != nullptr) claimed_ = std::exchange(diversion_->claims, false);
  }
  ~PassByScope() {
    if (diversion_ != nullptr) diversion_->claims = claimed_;
  }
  PassByScope(const PassByScope&) = delete;
  PassByScope& operator=(const PassByScope&) = delete;

 private:
  Diversion* const diversion_;
  bool claimed_ = false;
};

// Counts a diversion as underway for a scope.
class ActivityScope {
 public:
  explicit ActivityScope(std::atomic<uint64_t>& activity) : activity_(activity) {
    activity_.fetch_add((1ULL << 16) + 1);
  }
  ~ActivityScope() { activity_.fetch_sub(1); }
  ActivityScope(const ActivityScope&) = delete;
  ActivityScope& operator=(const ActivityScope&) = delete;

 private:
  std::atomic<uint64_t>& activity_;
};

bool is_underway(uint64_t activity) { return (activity & 0xFFFF) != 0; }

}  // namespace

TieredAllocator::TieredAllocator(cca::CUDAAllocator* native) : DelegatingAllocator(native) {
  for (int index = 0; index < kMaxDevices; ++index) {
    devices_[static_cast<size_t>(index)] =
        std::make_unique<Device>(native, static_cast<c10::DeviceIndex>(index));
  }
}

void TieredAllocator::start(const Config& config) {
  state().config.set(config);
  divert_from_.store(smallest_extended(config).count(), std::memory_order_relaxed);
  stop_recordings();
}

void TieredAllocator::stop() {
  divert_from_.store(kNothing, std::memory_order_relaxed);
  stop_recordings();
}

// No device is asked for: this must work before CUDA is up.
void TieredAllocator::stop_recordings() {
  if (gates_held() != 0)
    return;  // an observer; what this thread's diversion records to ends with it
  for (const auto& own : devices_) {
    GateScope gate(own->gate);
    own->pools.stop_recording();
  }
}

// `stream`: the request's, or nothing for the current one.
template <typename AskNative>
TieredAllocator::Answer<AskNative> TieredAllocator::serve(size_t nbytes,
                                                          std::optional<cudaStream_t> stream,
                                                          const AskNative& ask_native) {
  if (C10_UNLIKELY(gates_held() != 0)) {
    PassByScope pass_by(current_diversion());
    return ask_native();
  }
  if (C10_LIKELY(nbytes < divert_from_.load(std::memory_order_relaxed))) {
    return serve_from_hbm(ask_native);
  }
  const Config& config = state().config.get();
  const Request request{Bytes(nbytes), c10::cuda::current_device()};
  const auto placement = place(request, config);
  if (!placement) return serve_from_hbm(ask_native);
  const auto index = static_cast<c10::DeviceIndex>(request.device);
  const cudaStream_t used =
      stream ? *stream : static_cast<cudaStream_t>(c10::cuda::getCurrentCUDAStream(index));
  // With caching off (torch.cuda.caching_allocator_enable(False)) torch ignores pools.
  if (!target()->isEnabled() || device(index).recordings.claim(used)) {
    return serve_from_hbm(ask_native);
  }
  return divert(request, used, *placement, ask_native);
}

// A diversion on another thread keeps torch 2.11 and 2.12 from freeing its cache, so a request that
// runs out of memory beside one is tried again when that is over. Cached segments of plain device
// memory are also given back first.
template <typename AskNative>
TieredAllocator::Answer<AskNative> TieredAllocator::serve_from_hbm(const AskNative& ask_native) {
  const uint64_t activity = activity_.load(std::memory_order_relaxed);
  try {
    return ask_native();
  } catch (c10::OutOfMemoryError& error) {
    const auto index = c10::cuda::current_device();
    const bool holds_hbm = state().ledger.counters(index, BackingKind::kDevice).reserved > Bytes(0);
    const bool overlapped =
        kRecordingsFreezeDevice && (is_underway(activity) || activity_.load() != activity);
    const bool own_pool =
        device(index).recordings.claim(c10::cuda::getCurrentCUDAStream(index).stream());
    if (gates_held() != 0 || own_pool || !(holds_hbm || overlapped)) {
      if (state().ledger.reserved(index) > Bytes(0)) error.add_context(describe_tiers(index, ""));
      throw;
    }
  }
  emptyCache();
  const auto index = c10::cuda::current_device();
  GateScope gate(device(index).gate);
  try {
    return ask_native();
  } catch (c10::OutOfMemoryError& error) {
    error.add_context(describe_tiers(index, ""));
    throw;
  }
}

template <typename AskNative>
TieredAllocator::Answer<AskNative> TieredAllocator::divert(const Request& request,
                                                           cudaStream_t stream,
                                                           const Placement& placement,
                                                           const AskNative& ask_native) {
  const auto index = static_cast<c10::DeviceIndex>(request.device);
  Device& own = device(index);
  const auto limit = state().config.get().limit;
  if (limit && segment_size(request.size) > *limit) {
    // Never to be served: said before torch is asked, which would count and announce a failure.
    state().ledger.refused_by_limit(index, placement.backing);
    TORCH_CHECK_WITH(OutOfMemoryError, false, "egm_alloc: ", describe(request.size),
                     " do not fit under the extended tier's limit of ", describe(*limit),
                     " on device ", static_cast<int>(index), ". Raise limit_gib or allocate less.");
  }
  for (bool last_try = false;; last_try = true) {
    Diversion diversion;
    try {
      auto served = [&] {
        GateScope gate(own.gate);
        // Whatever happens, the room made for a segment that then did not come is taken back.
        const auto tidy = c10::make_scope_exit([&] { tidy_after_diversion(own, diversion); });
        return record_and_ask(own, request, stream, placement, diversion, ask_native);
      }();
      state().ledger.request_served(index, placement.backing);
      if (diversion.problems) warn_once(*diversion.problems);
      return served;
    } catch (c10::OutOfMemoryError& error) {
      if (last_try) {
        error.add_context(describe_tiers(index, diversion.report().failure));
        throw;
      }
    }
    // In a live pool torch cannot give back what is cached, so that is done here. More than our own
    // can help only plain device memory.
    if (placement.backing == BackingKind::kDevice) {
      emptyCache();
    } else {
      GateScope gate(own.gate);
      give_back_cached(own);
    }
  }
}

// Under the gate.
template <typename AskNative>
TieredAllocator::Answer<AskNative> TieredAllocator::record_and_ask(
    Device& own, const Request& request, cudaStream_t stream, const Placement& placement,
    Diversion& diversion, const AskNative& ask_native) {
  const bool in_hbm = placement.backing == BackingKind::kDevice;
  own.fraction.allow_extended(in_hbm ? Bytes(0) : segment_size(request.size));
  if (kRecordingsFreezeDevice && own.stream_recorded.load(std::memory_order_relaxed)) {
    process_pending_events(stream);
  }
  const Pool* pool = &own.pools.live(placement, request.size);
  const auto limit = state().config.get().limit;
  if (limit && state().ledger.reserved(own.index) + segment_size(request.size) > *limit &&
      !own.pools.has_cached(*pool, request.size, stream)) {
    // Before torch is asked: it would count the failure and announce it to observers.
    give_back_cached(own);
    pool = &own.pools.live(placement, request.size);
  }
  ActivityScope activity(activity_);
  DiversionScope scope(diversion);
  RecordingScope recording(own.pools, *pool);
  auto result = ask_native();
  if (may_keep_recording(own)) recording.keep_open();
  return result;
}

// Note [Open recordings]
// ~~~~~~~~~~~~~~~~~~~~~~
// Beginning and ending a recording cost more than the rest of a diversion. In mode "managed" the
// next request is a diversion too, so the recording is left open for it. It claims nothing outside
// of a diversion. What an open recording disturbs in torch 2.11 and 2.12 ends it first:
// recordStream (and from then on none is left open), emptyCache, checkpoints, recordings of others,
// switching off.
bool TieredAllocator::may_keep_recording(const Device& own) const {
  return state().config.get().mode == Mode::kManaged && started() && !own.recordings.any() &&
         !(kRecordingsFreezeDevice && own.stream_recorded.load(std::memory_order_relaxed));
}

// torch 2.11 and 2.12 look whether recorded streams have finished only in an allocation outside of
// any recording. In mode "managed" there might be none, and blocks would pile up.
void TieredAllocator::process_pending_events(cudaStream_t stream) {
  try {
    target()->raw_delete(target()->raw_alloc_with_stream(512, stream));
  } catch (const c10::OutOfMemoryError&) {
    // HBM is full; the events were looked at all the same.
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

// Under the gate.
void TieredAllocator::give_back_cached(Device& own) {
  own.pools.retire_all();
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

std::string TieredAllocator::describe_tiers(c10::DeviceIndex index, const std::string& failure) {
  const Bytes extended = state().ledger.reserved(index);
  std::string text = "egm_alloc: on device " + std::to_string(index) +
                     " torch holds in the device tier " + describe(report(index).device_reserved) +
                     " and in the extended tier " + describe(extended);
  if (const auto limit = state().config.get().limit) text += " of a limit of " + describe(*limit);
  if (!failure.empty()) text += "; " + failure;
  return text;
}

c10::DataPtr TieredAllocator::allocate(size_t n) {
  return serve(n, std::nullopt, [&] { return target()->allocate(n); });
}

void* TieredAllocator::raw_alloc(size_t nbytes) {
  return serve(nbytes, std::nullopt, [&] { return target()->raw_alloc(nbytes); });
}

void* TieredAllocator::raw_alloc_with_stream(size_t nbytes, cudaStream_t stream) {
  return serve(nbytes, stream, [&] { return target()->raw_alloc_with_stream(nbytes, stream); });
}

}  // namespace egm
