// torch's allocator with a second tier: large requests are served from pools of ours inside torch's
// own caching allocator. Caching, splitting, streams, statistics and graphs stay torch's; this adds
// where the memory of a segment lives.
//
// Note [What is wrapped]
// ~~~~~~~~~~~~~~~~~~~~~~
// Frees do not pass through here: a DataPtr keeps native's deleter, because recordStream ignores
// any other in silence. Installed once and leaked: a recording begun through us and ended past us
// would leave a filter into a dead graph, so switching off only stops diverting.
#pragma once

#include <array>
#include <atomic>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <type_traits>
#include <vector>

#include "core/config.h"
#include "core/placement.h"
#include "torch/delegating_allocator.h"
#include "torch/gate.h"
#include "torch/memory_fraction.h"
#include "torch/pools.h"
#include "torch/user_recordings.h"

namespace egm {

// What torch's allocator holds on one device, by tier. Memory that the C pair handed to a pool of
// the user's is in neither: the ledger has it.
struct TierReport {
  struct Blocks {
    Bytes allocated;
    uint64_t count = 0;
  };
  Bytes device_allocated;
  Bytes device_reserved;
  std::array<Blocks, kBackingKinds> extended;
  // Of both tiers, by the tag of place().
  struct Tagged {
    Bytes allocated;
    Bytes reserved;
  };
  std::map<int, Tagged> tags;
};

class TieredAllocator final : public DelegatingAllocator {
 public:
  explicit TieredAllocator(cca::CUDAAllocator* native);

  // Divert requests from the smallest that `config` sends to the extended tier. What is left open
  // for the configuration before ends with stop_recordings, which is to be called after either.
  void start(const Config& config);
  void stop();
  // Waits for gates: a caller holds no lock that an out-of-memory observer may want.
  void stop_recordings();
  bool started() const { return divert_from_.load(std::memory_order_relaxed) != kNothing; }

  TierReport report(c10::DeviceIndex index);
  // set_device_part; where memory is short for it, what is cached is given back first. What it
  // throws says how much has moved. Returns the bytes moved.
  Bytes move(void* base, Bytes device_part);
  // Of all devices with managed memory. Not with torch's lock of any held.
  void tell_hbm_of_torch();
  // Whether a CUDA graph capture or another pool's recording is underway there.
  bool is_recorded_by_user(c10::DeviceIndex index) { return device(index).recordings.any(); }

  c10::DataPtr allocate(size_t n) override;
  void* raw_alloc(size_t nbytes) override;
  void* raw_alloc_with_stream(size_t nbytes, cudaStream_t stream) override;

  void attachOutOfMemoryObserver(cca::OutOfMemoryObserver observer) override;
  cca::DeviceStats getDeviceStats(c10::DeviceIndex device) override;
  void resetAccumulatedStats(c10::DeviceIndex device) override;

  void recordStream(const c10::DataPtr& ptr, c10::Stream stream) override;
  void recordStream(const c10::DataPtr& ptr, c10::cuda::CUDAStream stream) override;
  void emptyCache(c10::MempoolId_t id = {0, 0}) override;
  void beginAllocateToPool(c10::DeviceIndex device, c10::MempoolId_t id,
                           std::function<bool(cudaStream_t)> filter) override;
  void endAllocateToPool(c10::DeviceIndex device, c10::MempoolId_t id) override;
  std::shared_ptr<cca::AllocatorState> getCheckpointState(c10::DeviceIndex device,
                                                          c10::MempoolId_t id) override;
  cca::CheckpointDelta setCheckpointPoolState(c10::DeviceIndex device,
                                              std::shared_ptr<cca::AllocatorState> state) override;

  double getMemoryFraction(c10::DeviceIndex device) override;
  void setMemoryFraction(double fraction, c10::DeviceIndex device) override;
  void cacheInfo(c10::DeviceIndex device, size_t* largest) override;
  cca::ShareableHandle shareIpcHandle(void* ptr) override;
  void enablePeerAccess(c10::DeviceIndex device, c10::DeviceIndex device_to_access) override;
  cudaError_t memcpyAsync(void* dst, int dst_device, const void* src, int src_device, size_t count,
                          cudaStream_t stream, bool p2p_enabled) override;

 private:
  static constexpr size_t kNothing = ~size_t{0};

  struct Device {
    Device(cca::CUDAAllocator* native, c10::DeviceIndex index, std::atomic<size_t>& open_below)
        : index(index), pools(native, index, open_below), fraction(native, index) {}

    const c10::DeviceIndex index;

    Gate gate;
    UserRecordings recordings;
    Pools pools;
    MemoryFraction fraction;
    std::atomic<bool> stream_recorded{false};
    // Failures that torch has counted in num_ooms and the user has not seen.
    std::atomic<int64_t> quiet_failures{0};
    // Pools that an observer asked to empty in the midst of a diversion.
    std::vector<c10::MempoolId_t> postponed_empties;
  };

  // `AskNative` makes the request of torch's allocator; it may be made more than once.
  template <typename AskNative>
  using Answer = std::invoke_result_t<const AskNative&>;

  template <typename AskNative>
  Answer<AskNative> serve(size_t nbytes, std::optional<cudaStream_t> stream,
                          const AskNative& ask_native);
  template <typename AskNative>
  Answer<AskNative> serve_open(ThisThread& thread, size_t nbytes,
                               std::optional<cudaStream_t> stream, const AskNative& ask_native);
  template <typename AskNative>
  Answer<AskNative> serve_any(ThisThread& thread, size_t nbytes, std::optional<cudaStream_t> stream,
                              const AskNative& ask_native);
  template <typename AskNative>
  Answer<AskNative> serve_from_hbm(ThisThread& thread, size_t nbytes,
                                   std::optional<cudaStream_t> stream, const AskNative& ask_native);
  template <typename AskNative>
  Answer<AskNative> serve_claimed(ThisThread& thread, const AskNative& ask_native);
  template <typename AskNative>
  Answer<AskNative> serve_without_room(ThisThread& thread, size_t nbytes,
                                       std::optional<cudaStream_t> stream,
                                       const AskNative& ask_native);
  template <typename AskNative>
  Answer<AskNative> divert(ThisThread& thread, const Request& request,
                           std::optional<cudaStream_t> stream, const Config& config,
                           const Placement& placement, const AskNative& ask_native);
  template <typename AskNative>
  Answer<AskNative> record_and_ask(ThisThread& thread, Device& own, const Request& request,
                                   const Config& config, const Placement& placement,
                                   Diversion& diversion, const AskNative& ask_native);

  static Bytes block_size(Bytes request);
  static Bytes segment_size(Bytes request);
  bool claimed_by_user(int index, std::optional<cudaStream_t> stream);
  static cudaStream_t stream_of(int index, std::optional<cudaStream_t> stream);
  size_t may_open_below(const Device& own, const Request& request, const Config& config);
  void after_open_miss(const Diversion& diversion);
  static void give_up(const c10::DataPtr&) {}  // its destructor frees it
  void give_up(void* served) { target()->raw_delete(served); }
  // See Note [Warnings as errors].
  template <typename Served, typename Warn>
  void warn_or_give_up(const Served& served, const Warn& warn) {
    try {
      warn();
    } catch (...) {
      give_up(served);
      throw;
    }
  }
  void bring_up(Device& own, const Request& request, const Config& config,
                const Placement& placement, Diversion& diversion);
  static bool exceeds_limit(const Device& own, Bytes segment, const Config& config);
  void after_spill();
  void restore_device_part(Device& own, const Placement& placement, const void* served);
  static const void* address_of(const c10::DataPtr& served) { return served.get(); }
  static const void* address_of(const void* served) { return served; }
  void process_pending_events(Device& own, cudaStream_t stream);
  void give_back_cached(Device& own);
  void give_back_hbm(Device& own);
  void give_back_everywhere();
  void empty_retired(Device& own);
  void empty_postponed(Device& own);
  void tidy_after_diversion(Device& own, const Diversion& diversion) noexcept;
  // Counts the refusal and throws, in the words by which programs know torch's error.
  [[noreturn]] void refuse(c10::DeviceIndex device, const Placement& placement, Refusal refusal,
                           const std::string& why);
  std::string describe_tiers(c10::DeviceIndex device, const std::string& failure);
  std::vector<Gate*> all_gates();
  Device& device(c10::DeviceIndex index) { return *devices_.at(static_cast<size_t>(index)); }

  // The smallest request that is diverted on any device.
  std::atomic<size_t> divert_from_{kNothing};
  // Requests smaller than this may find an open recording on their device; zero if none is open.
  std::atomic<size_t> open_below_{0};
  // Any diversion yet, on any device.
  std::atomic<bool> diverted_before_{false};
  // Whether what HBM cannot hold is spilled.
  std::atomic<bool> spills_{false};
  // Host memory is held that serves, or served, what HBM could not hold.
  std::atomic<bool> holds_spilled_{false};
  std::atomic<unsigned> served_since_spill_{0};
  // Recordings of others underway, on all devices.
  std::atomic<int> user_recordings_{0};
  std::array<std::unique_ptr<Device>, kMaxDevices> devices_;
};

}  // namespace egm
