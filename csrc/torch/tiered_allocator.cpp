// Which requests are diverted, and how; the rest of torch's interface is in tiered_interface.cpp.
#include "torch/tiered_allocator.h"

#include <c10/cuda/CUDAFunctions.h>

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
}

void TieredAllocator::stop() { divert_from_.store(kNothing, std::memory_order_relaxed); }

// `stream`: the request's, or nothing for the current one.
template <typename AskNative>
TieredAllocator::Answer<AskNative> TieredAllocator::serve(size_t nbytes, std::optional<cudaStream_t> stream,
                            const AskNative& ask_native) {
  if (C10_UNLIKELY(gates_held() != 0)) {
    PassByScope pass_by(current_diversion());
    return ask_native();
  }
  if (C10_LIKELY(nbytes < divert_from_.load(std::memory_order_relaxed))) {
    return serve_from_hbm(ask_native);
  }
  const auto config = state().config.get();
  const Request request{Bytes(nbytes), c10::cuda::current_device()};
  const auto placement = place(request, *config);
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
    const bool holds_hbm =
        state().ledger.counters(index, BackingKind::kDevice).reserved > Bytes(0);
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
TieredAllocator::Answer<AskNative> TieredAllocator::divert(const Request& request, cudaStream_t stream,
                             const Placement& placement, const AskNative& ask_native) {
  const auto index = static_cast<c10::DeviceIndex>(request.device);
  Device& own = device(index);
  const auto limit = state().config.get()->limit;
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
        auto result = record_and_ask(own, request, stream, placement, diversion, ask_native);
        tidy_after_diversion(own, diversion);
        return result;
      }();
      state().ledger.request_served(index, placement.backing);
      warn_once(diversion);
      return served;
    } catch (c10::OutOfMemoryError& error) {
      if (last_try) {
        error.add_context(describe_tiers(index, diversion.failure));
        throw;
      }
    }
    // In a live pool torch cannot give back what is cached, so that is done here.
    emptyCache();
  }
}

// Under the gate.
template <typename AskNative>
TieredAllocator::Answer<AskNative> TieredAllocator::record_and_ask(Device& own, const Request& request, cudaStream_t stream,
                                     const Placement& placement, Diversion& diversion,
                                     const AskNative& ask_native) {
  own.fraction.allow_extended(segment_size(request.size));
  if (kRecordingsFreezeDevice && own.stream_recorded.load(std::memory_order_relaxed)) {
    process_pending_events(stream);
  }
  const Pool& pool = own.pools.live(placement, request.size);
  ActivityScope activity(activity_);
  DiversionScope scope(diversion);
  PoolScope recording(target(), static_cast<c10::DeviceIndex>(request.device), pool);
  return ask_native();
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

// Under the gate. A miss is the time to give back what retired pools have cached since.
void TieredAllocator::tidy_after_diversion(Device& own, const Diversion& diversion) {
  for (const auto& id : std::exchange(own.postponed_empties, {})) target()->emptyCache(id);
  // With a recording of somebody else's underway torch would assert that there is none.
  if (diversion.missed && own.pools.any_retired() && !own.recordings.any()) {
    own.pools.empty_retired();
  }
  own.fraction.allow_extended(Bytes(0));
}

std::string TieredAllocator::describe_tiers(c10::DeviceIndex index, const std::string& failure) {
  const Bytes extended = state().ledger.reserved(index);
  std::string text = "egm_alloc: on device " + std::to_string(index) +
                     " torch holds in the device tier " + describe(report(index).device_reserved) +
                     " and in the extended tier " + describe(extended);
  if (const auto limit = state().config.get()->limit) text += " of a limit of " + describe(*limit);
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
