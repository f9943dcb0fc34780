// Our private pools inside torch's allocator, on one device. It has no lock of its own: all calls
// are made under the device's gate.
//
// Note [Uses of a pool]
// ~~~~~~~~~~~~~~~~~~~~~
// torch frees the cached segments of a pool only when nobody uses it any more, and a pool whose
// uses have reached zero cannot be recorded to again. Creating a pool is its base use; beginning
// to record adds one, which ending does not take back: each recording is begin, end, releasePool.
// To give back what a live pool has cached, its base use is released (it is retired) and torch is
// asked to empty its cache. Blocks still in use keep a retired pool's segments; torch returns those
// at a later emptyCache, and once the last is gone it forgets the pool, whose id can serve again.
#pragma once

#include <atomic>
#include <memory>
#include <vector>

#include "core/placement.h"
#include "torch/segment_source.h"

namespace egm {

struct Pool {
  enum class Stage { kLive, kRetired, kForgotten };

  c10::MempoolId_t id;
  Placement placement;
  int size_class = 0;
  Stage stage = Stage::kForgotten;
  // While its recording is left open: requests of less than this are claimed without a gate.
  std::atomic<size_t> open_below{0};
  // One reference is ours and is leaked at exit with the rest of the allocator: torch's static
  // destructor drops its own.
  std::shared_ptr<SegmentSource> source;
};

class Pools {
 public:
  // `open_below` is put to zero when an open recording ends: requests are not to look for it.
  Pools(cca::CUDAAllocator* native, c10::DeviceIndex device, std::atomic<size_t>& open_below)
      : native_(native), device_(device), open_below_(open_below) {}

  // A live pool for requests of this placement and size, made if there is none.
  Pool& live(const Placement& placement, Bytes size);

  // Sends to `pool` what a thread asks for in a Diversion to it. At most one pool is recorded to at
  // a time; recording to one already recorded to costs nothing.
  void record(Pool& pool);
  void stop_recording() noexcept;

  // Releases the base use of every live pool that holds segments, or of some of them.
  void retire_all();
  template <typename Which>
  void retire(const Which& which) {
    stop_recording();
    for (const auto& pool : pools_) {
      if (which(*pool)) retire(*pool);
    }
  }
  // Asks torch for the cached segments of retired pools. With a recording of somebody else's
  // underway torch 2.11 and 2.12 would assert that there is none.
  void empty_retired();
  // To be called after torch has emptied its cache: retired pools without segments are gone there.
  void note_forgotten();

  // Whether torch serves a block of this size, rounded as torch does, from what is cached in
  // `pool`.
  bool has_cached(const Pool& pool, Bytes size, cudaStream_t stream) const;

  // Whether whole segments are cached in `pool` that are in HBM, in part at least.
  bool has_cached_hbm(const Pool& pool) const;

  bool any_retired() const;
  // Whether memory is held that serves, or served, what HBM could not hold.
  bool any_spilled() const;
  const std::vector<std::unique_ptr<Pool>>& all() const { return pools_; }

 private:
  void retire(Pool& pool);

  cca::CUDAAllocator* const native_;
  const c10::DeviceIndex device_;
  std::atomic<size_t>& open_below_;
  std::vector<std::unique_ptr<Pool>> pools_;
  Pool* recorded_ = nullptr;
};

// Records to a pool for a scope, and beyond it if that was asked for: see Note [Open recordings].
class RecordingScope {
 public:
  RecordingScope(Pools& pools, Pool& pool) : pools_(pools), pool_(pool) { pools_.record(pool); }
  ~RecordingScope() {
    if (!keep_open_) pools_.stop_recording();
  }
  void keep_open(size_t below) {
    keep_open_ = true;
    pool_.open_below.store(below, std::memory_order_relaxed);
  }
  RecordingScope(const RecordingScope&) = delete;
  RecordingScope& operator=(const RecordingScope&) = delete;

 private:
  Pools& pools_;
  Pool& pool_;
  bool keep_open_ = false;
};

}  // namespace egm
