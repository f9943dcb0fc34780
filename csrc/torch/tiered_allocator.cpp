// Which requests are diverted, and how; the rest of torch's interface is in tiered_interface.cpp.
#include "torch/tiered_allocator.h"

#include <c10/cuda/CUDAFunctions.h>
#include <c10/util/ScopeExit.h>

#include <algorithm>

#include "core/state.h"
#include "cuda/errors.h"
#include "cuda/host_reserve.h"
#include "cuda/traits.h"
#include "torch/thread_scopes.h"
#include "torch/warnings.h"

namespace egm {

TieredAllocator::TieredAllocator(cca::CUDAAllocator* native) : DelegatingAllocator(native) {
  for (int index = 0; index < kMaxDevices; ++index) {
    devices_[static_cast<size_t>(index)] =
        std::make_unique<Device>(native, static_cast<c10::DeviceIndex>(index), open_below_);
  }
}

void TieredAllocator::start(const Config& config) {
  state().config.set(config);
  open_below_.store(0, std::memory_order_relaxed);
  spills_.store(config.spill, std::memory_order_relaxed);
  divert_from_.store(smallest_extended(config).count(), std::memory_order_relaxed);
}

void TieredAllocator::stop() {
  divert_from_.store(kNothing, std::memory_order_relaxed);
  open_below_.store(0, std::memory_order_relaxed);
  spills_.store(false, std::memory_order_relaxed);
}

// No device is asked for: this must work before CUDA is up.
void TieredAllocator::stop_recordings() {
  // An observer; what this thread's diversion records to ends with it.
  if (this_thread().gates_held != 0) return;
  for (const auto& own : devices_) {
    GateScope gate(own->gate);
    own->pools.stop_recording();
  }
}

// Note [Open recordings]
// ~~~~~~~~~~~~~~~~~~~~~~
// Taking the gate, beginning and ending a recording cost more than the rest of a diversion. In mode
// "managed" nearly every request goes to the same pool, so its recording is left open and the next
// ones only ask torch, with no gate: they neither begin nor end anything. The recording claims
// nothing outside of diversions. What an open one disturbs in torch 2.11 and 2.12 ends it first:
// recordStream (and from then on none is left open), emptyCache, checkpoints, recordings of others,
// switching off. What no open recording has claimed is given up and diverted the long way.

// Note [Hot path]
// ~~~~~~~~~~~~~~~
// In a program most code is cold whenever torch asks for memory, so what a request costs goes by
// the cache lines it touches more than by its instructions. Hence serve() and serve_from_hbm() are
// small, the flags they look at lie side by side, and all else is in functions of its own.

// `stream`: the request's, or nothing for the current one.
template <typename AskNative>
TieredAllocator::Answer<AskNative> TieredAllocator::serve(size_t nbytes,
                                                          std::optional<cudaStream_t> stream,
                                                          const AskNative& ask_native) {
  ThisThread& thread = this_thread();
  if (C10_LIKELY(thread.gates_held == 0 && thread.place == nullptr)) {
    if (C10_LIKELY(nbytes < divert_from_.load(std::memory_order_relaxed))) {
      return serve_from_hbm(thread, nbytes, stream, ask_native);
    }
    if (nbytes < open_below_.load(std::memory_order_relaxed)) {
      return serve_open(thread, nbytes, stream, ask_native);
    }
  }
  return serve_any(thread, nbytes, stream, ask_native);
}

// See Note [Open recordings].
template <typename AskNative>
C10_NOINLINE TieredAllocator::Answer<AskNative> TieredAllocator::serve_open(
    ThisThread& thread, size_t nbytes, std::optional<cudaStream_t> stream,
    const AskNative& ask_native) {
  Diversion diversion;
  diversion.nbytes = nbytes;
  try {
    auto served = [&] {
      QuietScope quiet(thread, true);
      DiversionScope scope(thread, diversion);
      return ask_native();
    }();
    if (C10_LIKELY(diversion.claimed_on >= 0)) {
      state().ledger.request_served(diversion.claimed_on, BackingKind::kManaged);
      if (C10_UNLIKELY(diversion.missed)) {
        warn_or_give_up(served, [&] { after_open_miss(diversion); });
      }
      return served;
    }
    // Until one is open again, the long way only.
    open_below_.store(0, std::memory_order_relaxed);
    give_up(served);
  } catch (const c10::OutOfMemoryError&) {
    ++device(c10::cuda::current_device()).quiet_failures;
  }
  return serve_any(thread, nbytes, stream, ask_native);
}

// The long way, for requests of any kind.
template <typename AskNative>
C10_NOINLINE TieredAllocator::Answer<AskNative> TieredAllocator::serve_any(
    ThisThread& thread, size_t nbytes, std::optional<cudaStream_t> stream,
    const AskNative& ask_native) {
  if (thread.gates_held != 0) {
    PassByScope pass_by(thread.diversion);
    return ask_native();
  }
  const bool placed = thread.place != nullptr && started();
  if (!placed && nbytes < divert_from_.load(std::memory_order_relaxed)) {
    return serve_from_hbm(thread, nbytes, stream, ask_native);
  }
  const Config& config = state().config.get();
  const Request request{Bytes(nbytes), c10::cuda::current_device()};
  const auto placement =
      place(request, config, placed ? &thread.place->scope : nullptr, auto_backing);
  // With caching off (torch.cuda.caching_allocator_enable(False)) torch ignores pools.
  if (!placement || !target()->isEnabled() || claimed_by_user(request.device, stream)) {
    return serve_from_hbm(thread, nbytes, stream, ask_native);
  }
  return divert(thread, request, stream, config, *placement, ask_native);
}

// Up to which size requests share the pool of this one, if its recording may be left open for them;
// else zero. What needs the gate, such as a limit, keeps it closed. Under the gate: what is
// switched after this has looked ends the recording, what was switched while it waited does not.
size_t TieredAllocator::may_open_below(const Device& own, const Request& request,
                                       const Config& config) {
  const bool in_force = started() && &config == &state().config.get();
  const bool may = in_force && config.mode == Mode::kManaged && !config.devices && !config.limit &&
                   own.fraction.unlimited() && !own.recordings.any() &&
                   !(kRecordingsFreezeDevice && own.stream_recorded);
  const Bytes below = std::min(config.threshold, kEndOfClassZero);
  return may && request.size < below ? below.count() : 0;
}

bool TieredAllocator::exceeds_limit(const Device& own, Bytes segment, const Config& config) {
  return config.limit && state().ledger.reserved(own.index) + segment > *config.limit;
}

void TieredAllocator::after_open_miss(const Diversion& diversion) {
  {
    Device& own = device(static_cast<c10::DeviceIndex>(diversion.claimed_on));
    GateScope gate(own.gate);
    tidy_after_diversion(own, diversion);
  }
  if (diversion.problems) warn_once(*diversion.problems);
}

bool TieredAllocator::claimed_by_user(int index, std::optional<cudaStream_t> stream) {
  const auto& recordings = device(static_cast<c10::DeviceIndex>(index)).recordings;
  return recordings.any() && recordings.claim(stream_of(index, stream));
}

cudaStream_t TieredAllocator::stream_of(int index, std::optional<cudaStream_t> stream) {
  if (stream) return *stream;
  return c10::cuda::getCurrentCUDAStream(static_cast<c10::DeviceIndex>(index));
}

// A diversion on another thread keeps torch 2.11 and 2.12 from freeing its cache, and cached
// segments of ours may be plain device memory, so once anything was diverted a request that runs
// out of memory is tried again without either. What HBM then cannot hold is spilled.
template <typename AskNative>
C10_ALWAYS_INLINE TieredAllocator::Answer<AskNative> TieredAllocator::serve_from_hbm(
    ThisThread& thread, size_t nbytes, std::optional<cudaStream_t> stream,
    const AskNative& ask_native) {
  const bool may_retry =
      diverted_before_.load(std::memory_order_relaxed) || spills_.load(std::memory_order_relaxed);
  if (C10_UNLIKELY(user_recordings_.load(std::memory_order_relaxed) != 0) && may_retry &&
      claimed_by_user(c10::cuda::current_device(), stream)) {
    return serve_claimed(thread, ask_native);
  }
  try {
    QuietScope scope(thread, may_retry);
    auto served = ask_native();
    if (C10_UNLIKELY(holds_spilled_.load(std::memory_order_relaxed))) after_spill();
    return served;
  } catch (const c10::OutOfMemoryError&) {
    if (!may_retry) throw;
  }
  return serve_without_room(thread, nbytes, stream, ask_native);
}

// It is for a pool of the user's, or a capture.
template <typename AskNative>
C10_NOINLINE TieredAllocator::Answer<AskNative> TieredAllocator::serve_claimed(
    ThisThread& thread, const AskNative& ask_native) {
  try {
    QuietScope scope(thread, false);
    auto served = ask_native();
    if (holds_spilled_.load(std::memory_order_relaxed)) after_spill();
    return served;
  } catch (c10::OutOfMemoryError& error) {
    error.add_context(describe_tiers(c10::cuda::current_device(), ""));
    throw;
  }
}

// HBM ran out of memory, which nobody was told yet.
template <typename AskNative>
C10_NOINLINE TieredAllocator::Answer<AskNative> TieredAllocator::serve_without_room(
    ThisThread& thread, size_t nbytes, std::optional<cudaStream_t> stream,
    const AskNative& ask_native) {
  const bool again = diverted_before_.load(std::memory_order_relaxed);
  ++device(c10::cuda::current_device()).quiet_failures;
  const Config& config = state().config.get();
  const Request request{Bytes(nbytes), c10::cuda::current_device()};
  const auto spill = spills_ && target()->isEnabled()
                         ? spill_placement(request, config, auto_backing)
                         : std::optional<Placement>();
  Device& own = device(static_cast<c10::DeviceIndex>(request.device));
  if (again || !spill) {
    GateScope gate(own.gate, thread);
    give_back_hbm(own);
    try {
      QuietScope scope(thread, spill.has_value());
      return ask_native();
    } catch (c10::OutOfMemoryError& error) {
      if (!spill) {
        error.add_context(describe_tiers(request.device, ""));
        throw;
      }
      ++own.quiet_failures;
    }
  }
  std::string why_not;
  try {
    auto served = divert(thread, request, stream, config, *spill, ask_native);
    state().ledger.spilled(request.device, spill->backing);
    holds_spilled_ = true;
    served_since_spill_ = 0;
    warn_or_give_up(served, [&] { warn_of_spill(request, spill->backing); });
    return served;
  } catch (const c10::OutOfMemoryError& error) {
    why_not = error.what_without_backtrace();
  }
  // Nobody has it: torch's own error, which counts and is announced.
  GateScope gate(own.gate, thread);
  try {
    return ask_native();
  } catch (c10::OutOfMemoryError& error) {
    error.add_context("egm_alloc could not spill it: " + why_not);
    throw;
  }
}

template <typename AskNative>
TieredAllocator::Answer<AskNative> TieredAllocator::divert(
    ThisThread& thread, const Request& request, std::optional<cudaStream_t> stream,
    const Config& config, const Placement& placement, const AskNative& ask_native) {
  const auto index = static_cast<c10::DeviceIndex>(request.device);
  Device& own = device(index);
  if (config.limit && segment_size(request.size) > *config.limit) {
    // Never to be served: said before torch is asked, which would count and announce a failure.
    refuse(index, placement, Refusal::kByLimit,
           describe(request.size) + " do not fit under the extended tier's limit of " +
               describe(*config.limit) + " on device " + std::to_string(index) +
               ". Raise limit_gib or allocate less.");
  }
  Refusal refusal = Refusal::kNone;
  bool may_pass = false;
  for (bool last_try = false;; last_try = true) {
    Diversion diversion;
    diversion.stream = stream_of(index, stream);
    // A second refusal by our own limits is no failure of torch's: it stays quiet as well.
    const bool is_quiet = !last_try || refusal != Refusal::kNone;
    if (is_slow_to_bring_up(placement.backing)) {
      bring_up(own, request, config, placement, diversion);
    }
    try {
      auto served = [&] {
        GateScope gate(own.gate, thread);
        // Whatever happens, the room made for a segment that then did not come is taken back.
        const auto tidy = c10::make_scope_exit([&] { tidy_after_diversion(own, diversion); });
        QuietScope quiet(thread, is_quiet);
        return record_and_ask(thread, own, request, config, placement, diversion, ask_native);
      }();
      if (placement.backing == BackingKind::kSplit && !diversion.missed) {
        restore_device_part(own, placement, address_of(served));
      }
      if (diversion.problems) warn_or_give_up(served, [&] { warn_once(*diversion.problems); });
      return served;
    } catch (c10::OutOfMemoryError& error) {
      if (is_quiet) ++own.quiet_failures;
      const auto& problems = diversion.report();
      if (last_try) {
        count_refusal(index, placement.backing, problems.refusal);
        error.add_context(describe_tiers(index, problems.failure));
        throw;
      }
      refusal = problems.refusal;
      may_pass = problems.may_pass;
    }
    if (may_pass) {
      HostClaim::wait_for_room({segment_size(request.size), index}, placement);
    }
    // In a live pool torch cannot give back what is cached, so that is done here.
    if (placement.backing == BackingKind::kDevice || refusal == Refusal::kByReserve) {
      give_back_everywhere();
    } else {
      GateScope gate(own.gate, thread);
      give_back_cached(own);
    }
  }
}

// Under the gate.
template <typename AskNative>
TieredAllocator::Answer<AskNative> TieredAllocator::record_and_ask(
    ThisThread& thread, Device& own, const Request& request, const Config& config,
    const Placement& placement, Diversion& diversion, const AskNative& ask_native) {
  const auto used_stream = static_cast<cudaStream_t>(diversion.stream);
  const Bytes segment = segment_size(request.size);
  // What is ready is booked already.
  own.fraction.allow_extended(diversion.ready ? Bytes(0) : extended_share(segment, placement));
  if (kRecordingsFreezeDevice && own.stream_recorded.load(std::memory_order_relaxed)) {
    process_pending_events(own, used_stream);
  }
  Pool* pool = &own.pools.live(placement, request.size);
  if (exceeds_limit(own, segment, config) && diversion.ready == nullptr &&
      !own.pools.has_cached(*pool, block_size(request.size), used_stream)) {
    // Before torch is asked: it would count the failure and announce it to observers.
    give_back_cached(own);
    pool = &own.pools.live(placement, request.size);
  }
  diverted_before_.store(true, std::memory_order_relaxed);
  diversion.pool = pool;
  DiversionScope scope(thread, diversion);
  RecordingScope recording(own.pools, *pool);
  auto result = ask_native();
  state().ledger.request_served(own.index, placement.backing);
  if (const size_t below = thread.place ? 0 : may_open_below(own, request, config)) {
    recording.keep_open(below);
    open_below_.store(below, std::memory_order_relaxed);
  }
  return result;
}

c10::DataPtr TieredAllocator::allocate(size_t n) {
  // torch refuses 1 EB and more at once, without counting it.
  constexpr size_t kOneExabyte = size_t{1} << 60;
  if (C10_UNLIKELY(n >= kOneExabyte)) return target()->allocate(n);
  return serve(n, std::nullopt, [&] { return target()->allocate(n); });
}

void* TieredAllocator::raw_alloc(size_t nbytes) {
  return serve(nbytes, std::nullopt, [&] { return target()->raw_alloc(nbytes); });
}

void* TieredAllocator::raw_alloc_with_stream(size_t nbytes, cudaStream_t stream) {
  return serve(nbytes, stream, [&] { return target()->raw_alloc_with_stream(nbytes, stream); });
}

}  // namespace egm
