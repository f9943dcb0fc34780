// Our private pools inside torch's allocator, on one device. All calls are made under the device's
// gate, except begin-time construction.
//
// Note [Uses of a pool]
// ~~~~~~~~~~~~~~~~~~~~~
// torch frees the cached segments of a pool only when nobody uses it any more, and a pool whose
// uses have reached zero cannot be recorded to again. Creating a pool is its base use; beginning
// to record adds one, which ending does not take back: each diversion is begin, end, releasePool.
// To give back what a live pool has cached, its base use is released (it is retired) and torch is
// asked to empty its cache. Blocks still in use keep a retired pool's segments; torch returns those
// at a later emptyCache, and once the last is gone it forgets the pool, whose id can serve again.
#pragma once

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
  // One reference is ours and is leaked at exit with the rest of the allocator: torch's static
  // destructor drops its own.
  std::shared_ptr<SegmentSource> source;
};

class Pools {
 public:
  Pools(cca::CUDAAllocator* native, c10::DeviceIndex device) : native_(native), device_(device) {}

  // A live pool for requests of this placement and size, made if there is none.
  Pool& live(const Placement& placement, Bytes size);

  // Releases the base use of every live pool that holds segments.
  void retire_all();
  // Asks torch for the cached segments of retired pools.
  void empty_retired();
  // To be called after torch has emptied its cache: retired pools without segments are gone there.
  void note_forgotten();

  bool any_retired() const;
  const std::vector<std::unique_ptr<Pool>>& all() const { return pools_; }

 private:
  cca::CUDAAllocator* const native_;
  const c10::DeviceIndex device_;
  std::vector<std::unique_ptr<Pool>> pools_;
};

// One recording to a pool by the current thread.
class PoolScope {
 public:
  PoolScope(cca::CUDAAllocator* native, c10::DeviceIndex device, const Pool& pool);
  ~PoolScope();
  PoolScope(const PoolScope&) = delete;
  PoolScope& operator=(const PoolScope&) = delete;

 private:
  cca::CUDAAllocator* const native_;
  const c10::DeviceIndex device_;
  const c10::MempoolId_t id_;
};

}  // namespace egm
