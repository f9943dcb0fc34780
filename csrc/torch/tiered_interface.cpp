// The part of torch's allocator interface where plain forwarding is wrong.
#include <c10/cuda/CUDAFunctions.h>

#include <algorithm>
#include <optional>

#include "core/state.h"
#include "cuda/mapped_ranges.h"
#include "cuda/segments.h"
#include "torch/kernel_copy.h"
#include "torch/tiered_allocator.h"

namespace egm {

std::vector<Gate*> TieredAllocator::all_gates() {
  std::vector<Gate*> gates;
  const auto count = c10::cuda::device_count();
  gates.reserve(static_cast<size_t>(count));
  for (c10::DeviceIndex index = 0; index < count; ++index) gates.push_back(&device(index).gate);
  return gates;
}

// See Note [Quiet tries]. torch's statistics are the user's but for failures that were tried again.
void TieredAllocator::attachOutOfMemoryObserver(cca::OutOfMemoryObserver observer) {
  target()->attachOutOfMemoryObserver(
      [observer = std::move(observer)](int64_t index, size_t size, size_t total, size_t free) {
        if (!this_thread().quiet) observer(index, size, total, free);
      });
}

cca::DeviceStats TieredAllocator::getDeviceStats(c10::DeviceIndex index) {
  auto stats = target()->getDeviceStats(index);
  stats.num_ooms = std::max<int64_t>(0, stats.num_ooms - device(index).quiet_failures.load());
  return stats;
}

void TieredAllocator::resetAccumulatedStats(c10::DeviceIndex index) {
  target()->resetAccumulatedStats(index);
  device(index).quiet_failures = 0;
}

// Under the gate: up to torch 2.12 a stream recorded while any pool is recorded to counts as "used
// in a capture" and is later not waited for, which is wrong data.
void TieredAllocator::recordStream(const c10::DataPtr& ptr, c10::Stream stream) {
  recordStream(ptr, c10::cuda::CUDAStream(stream));
}

void TieredAllocator::recordStream(const c10::DataPtr& ptr, c10::cuda::CUDAStream stream) {
  if (!kRecordingsFreezeDevice || !ptr.device().is_cuda()) {
    target()->recordStream(ptr, stream);
    return;
  }
  Device& own = device(ptr.device().index());
  GateScope gate(own.gate);
  own.pools.stop_recording();
  target()->recordStream(ptr, stream);
  own.stream_recorded.store(true, std::memory_order_relaxed);
}

void TieredAllocator::emptyCache(c10::MempoolId_t id) {
  const bool everything = id == c10::MempoolId_t{0, 0};
  if (this_thread().gates_held != 0) {
    // An observer, in the midst of this thread's diversion: torch would assert on a single pool.
    if (everything) {
      target()->emptyCache(id);
    } else {
      device(c10::cuda::current_device()).postponed_empties.push_back(id);
    }
    return;
  }
  AllGatesScope gates(all_gates());
  release_postponed();
  const auto count = c10::cuda::device_count();
  for (c10::DeviceIndex index = 0; index < count; ++index) {
    if (everything) {
      device(index).pools.retire_all();
    } else {
      device(index).pools.stop_recording();
    }
  }
  target()->emptyCache(id);
  for (c10::DeviceIndex index = 0; index < count; ++index) {
    Device& own = device(index);
    if (!own.recordings.any()) empty_postponed(own);
    if (own.pools.all().empty()) continue;
    own.pools.note_forgotten();
    own.fraction.allow_extended(Bytes(0));
  }
}

// Under the gate: what we ask of torch after a diversion depends on who else records.
void TieredAllocator::beginAllocateToPool(c10::DeviceIndex index, c10::MempoolId_t id,
                                          std::function<bool(cudaStream_t)> filter) {
  Device& own = device(index);
  GateScope gate(own.gate);
  own.pools.stop_recording();
  target()->beginAllocateToPool(index, id, filter);
  own.recordings.add(id, std::move(filter));
  ++user_recordings_;
}

void TieredAllocator::endAllocateToPool(c10::DeviceIndex index, c10::MempoolId_t id) {
  Device& own = device(index);
  GateScope gate(own.gate);
  target()->endAllocateToPool(index, id);
  if (own.recordings.remove(id)) --user_recordings_;
}

std::shared_ptr<cca::AllocatorState> TieredAllocator::getCheckpointState(c10::DeviceIndex index,
                                                                         c10::MempoolId_t id) {
  Device& own = device(index);
  GateScope gate(own.gate);
  own.pools.stop_recording();
  return target()->getCheckpointState(index, id);
}

cca::CheckpointDelta TieredAllocator::setCheckpointPoolState(
    c10::DeviceIndex index, std::shared_ptr<cca::AllocatorState> state) {
  Device& own = device(index);
  GateScope gate(own.gate);
  own.pools.stop_recording();
  return target()->setCheckpointPoolState(index, std::move(state));
}

double TieredAllocator::getMemoryFraction(c10::DeviceIndex index) {
  return device(index).fraction.get();
}

void TieredAllocator::setMemoryFraction(double fraction, c10::DeviceIndex index) {
  device(index).fraction.set(fraction);
}

// cuDNN sizes its workspaces by this: our cached blocks must not make it larger than what HBM can
// still give.
void TieredAllocator::cacheInfo(c10::DeviceIndex index, size_t* largest) {
  target()->cacheInfo(index, largest);
  const Bytes extended = state().ledger.reserved(index);
  if (extended == Bytes(0)) return;
  constexpr auto kAll = static_cast<size_t>(c10::CachingAllocator::StatType::AGGREGATE);
  const Bytes reserved(
      static_cast<uint64_t>(target()->getDeviceStats(index).reserved_bytes[kAll].current));
  const Bytes hbm = reserved > extended ? reserved - extended : Bytes(0);
  const Bytes free(target()->getMemoryInfo(index).first);
  *largest = std::min<size_t>(*largest, (free + hbm).count());
}

cca::ShareableHandle TieredAllocator::shareIpcHandle(void* ptr) {
  const auto segment = state().segments.find(ptr);
  TORCH_CHECK(!segment || segment->placement.backing == BackingKind::kDevice,
              "egm_alloc: a tensor in ", to_string(segment->placement.backing),
              " memory cannot be shared with another process: CUDA IPC takes only memory from "
              "cudaMalloc. Make it while egm_alloc is disabled, or share a CPU copy.");
  return target()->shareIpcHandle(ptr);
}

void TieredAllocator::enablePeerAccess(c10::DeviceIndex index, c10::DeviceIndex owner) {
  target()->enablePeerAccess(index, owner);
  allow_peer(index, owner);
}

// Mapped memory (numa, split) is reached only by devices that were granted access; a peer copy
// works without. torch knows only its own such segments.
cudaError_t TieredAllocator::memcpyAsync(void* dst, int dst_device, const void* src, int src_device,
                                         size_t count, cudaStream_t stream, bool p2p_enabled) {
  const auto backing_of = [](const void* ptr) {
    const auto segment = state().segments.find(ptr);
    return segment ? std::optional(segment->placement.backing) : std::nullopt;
  };
  if (backing_of(src) == BackingKind::kPinned && backing_of(dst) == BackingKind::kPinned) {
    copy_by_kernel(dst, src, count, src_device, stream);
    return cudaSuccess;
  }
  const auto is_mapped = [&](const void* ptr) {
    const auto backing = backing_of(ptr);
    return backing == BackingKind::kNuma || backing == BackingKind::kSplit;
  };
  if (dst_device != src_device && (is_mapped(dst) || is_mapped(src))) {
    return cudaMemcpyPeerAsync(dst, dst_device, src, src_device, count, stream);
  }
  return target()->memcpyAsync(dst, dst_device, src, src_device, count, stream, p2p_enabled);
}

TierReport TieredAllocator::report(c10::DeviceIndex index) {
  TierReport report;
  for (const auto& info : segments_of(*target(), {0, 0})) {
    if (info.device != index) continue;
    const auto segment = state().segments.find(reinterpret_cast<const void*>(info.address));
    if (!segment) {
      report.device_allocated = report.device_allocated + Bytes(info.allocated_size);
      report.device_reserved = report.device_reserved + Bytes(info.total_size);
    } else if (segment->owner == SegmentOwner::kTorch) {
      auto& blocks = report.extended.at(static_cast<size_t>(segment->placement.backing));
      blocks.allocated = blocks.allocated + Bytes(info.allocated_size);
      if (segment->placement.tag != 0) {
        auto& tagged = report.tags[segment->placement.tag];
        tagged.allocated = tagged.allocated + Bytes(info.allocated_size);
        tagged.reserved = tagged.reserved + Bytes(info.total_size);
      }
      blocks.count += static_cast<uint64_t>(
          std::count_if(info.blocks.begin(), info.blocks.end(),
                        [](const cca::BlockInfo& block) { return block.allocated; }));
    }
  }
  return report;
}

}  // namespace egm
