// Our private pools inside torch's allocator.
#include "torch/pools.h"

#include <ATen/cuda/MemPool.h>
#include <c10/core/AllocatorConfig.h>

#include <algorithm>
#include <utility>

#include "cuda/mapped_ranges.h"

namespace egm {

bool Diversion::wants(const Pool& candidate) const {
  if (!claims) return false;
  return pool != nullptr ? pool == &candidate
                         : nbytes < candidate.open_below.load(std::memory_order_relaxed);
}

Pool& Pools::live(const Placement& placement, Bytes size) {
  const int wanted = size_class(size);
  Pool* reusable = nullptr;
  for (const auto& pool : pools_) {
    if (pool->size_class != wanted || !(pool->placement == placement)) continue;
    if (pool->stage == Pool::Stage::kLive) return *pool;
    if (pool->stage == Pool::Stage::kForgotten) reusable = pool.get();
  }
  if (reusable == nullptr) {
    auto pool = std::make_unique<Pool>();
    // Never an id of our own making: torch's hash of ids takes only one half of the pair, and ids
    // that collide make its table grow without end.
    pool->id = at::cuda::MemPool::graph_pool_handle();
    pool->placement = placement;
    pool->size_class = wanted;
    pool->source = std::make_shared<SegmentSource>(native_, device_, placement);
    reusable = pools_.emplace_back(std::move(pool)).get();
  }
  native_->createOrIncrefPool(device_, reusable->id, as_pool_allocator(reusable->source));
  reusable->stage = Pool::Stage::kLive;
  return *reusable;
}

void Pools::retire_all() {
  retire([](const Pool&) { return true; });
}

void Pools::retire(Pool& pool) {
  if (pool.stage != Pool::Stage::kLive || pool.source->segments() == 0) return;
  native_->releasePool(device_, pool.id);
  pool.stage = Pool::Stage::kRetired;
}

void Pools::empty_retired() {
  stop_recording();
  for (const auto& pool : pools_) {
    if (pool->stage == Pool::Stage::kRetired) native_->emptyCache(pool->id);
  }
  note_forgotten();
}

void Pools::note_forgotten() {
  for (const auto& pool : pools_) {
    if (pool->stage == Pool::Stage::kRetired && pool->source->segments() == 0) {
      pool->stage = Pool::Stage::kForgotten;
    }
  }
}

bool Pools::any_retired() const {
  return std::any_of(pools_.begin(), pools_.end(),
                     [](const auto& pool) { return pool->stage == Pool::Stage::kRetired; });
}

bool Pools::any_spilled() const {
  return std::any_of(pools_.begin(), pools_.end(), [](const auto& pool) {
    return pool->placement.spilled && pool->source->segments() > 0;
  });
}

void Pools::record(Pool& pool) {
  if (recorded_ == &pool) return;
  stop_recording();
  native_->beginAllocateToPool(device_, pool.id, [&pool, device = device_](cudaStream_t) {
    Diversion* const diversion = this_thread().diversion;
    if (diversion == nullptr || !diversion->wants(pool)) return false;
    diversion->claimed_on = device;
    return true;
  });
  recorded_ = &pool;
}

void Pools::stop_recording() noexcept {
  if (recorded_ == nullptr) return;
  Pool& pool = *std::exchange(recorded_, nullptr);
  if (pool.open_below.exchange(0, std::memory_order_relaxed) != 0) {
    open_below_.store(0, std::memory_order_relaxed);
  }
  const auto try_to = [](const auto& call) {
    try {
      call();
    } catch (const std::exception& error) {
      // Not seen on any torch so far. The diversion, if there is one, warns when it is over.
      if (Diversion* const diversion = this_thread().diversion) {
        diversion->report().pool_failure = error.what();
      }
    }
  };
  try_to([&] { native_->endAllocateToPool(device_, pool.id); });
  try_to([&] { native_->releasePool(device_, pool.id); });
}

bool Pools::has_cached_hbm(const Pool& pool) const {
  if (pool.source->segments() == 0) return false;
  const BackingKind backing = pool.placement.backing;
  if (backing == BackingKind::kManaged || backing == BackingKind::kPinned) return false;
  const auto segments = segments_of(*native_, pool.id);
  return std::any_of(segments.begin(), segments.end(), [&](const auto& segment) {
    if (segment.device != device_ || segment.allocated_size != 0) return false;
    if (backing == BackingKind::kDevice) return true;
    // What is mapped may have been migrated.
    const auto parts = range_parts(reinterpret_cast<const void*>(segment.address));
    return parts && parts->on_device > Bytes(0);
  });
}

bool Pools::has_cached(const Pool& pool, Bytes size, cudaStream_t stream) const {
  if (pool.source->segments() == 0) return false;
  constexpr size_t kNone = ~size_t{0};
  size_t best = kNone;
  for (const auto& segment : segments_of(*native_, pool.id)) {
    if (segment.device != device_ || segment.stream != stream) continue;
    for (const auto& block : segment.blocks) {
      if (!block.active && block.size >= size.count()) best = std::min<size_t>(best, block.size);
    }
  }
  if (best == kNone) return false;
  // What torch (get_free_block in c10/cuda/CUDACachingAllocator.cpp) will not split.
  using TorchConfig = c10::CachingAllocator::AcceleratorAllocatorConfig;
  const size_t unsplit_from = TorchConfig::max_split_size();
  if (size.count() < unsplit_from) return best < unsplit_from;
  return best - size.count() < TorchConfig::max_non_split_rounding_size();
}

}  // namespace egm
