// An allocator that forwards everything to another one, unchanged. Subclasses override a handful.
//
// Every virtual of CUDAAllocator and its bases is here, those with a default too: several defaults
// do nothing in silence. What a torch declares is found in its headers when the extension is built
// (egm_alloc_torch_features.h); this is the only file with guards for torch versions.
#pragma once

#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/CUDAStream.h>
#include <egm_alloc_torch_features.h>

#include <memory>
#include <string>
#include <unordered_set>
#include <utility>
#include <vector>

namespace egm {

namespace cca = c10::cuda::CUDACachingAllocator;

// Up to torch 2.12 a recording on any thread makes torch treat the whole device as capturing. From
// 2.13 a real capture on the caller's stream counts, announced through markCaptureBegin.
inline constexpr bool kRecordingsFreezeDevice = !EGM_ALLOC_TORCH_HAS_MARK_CAPTURE_BEGIN;

// What createOrIncrefPool takes: torch 2.11 shares a pool's allocator, earlier ones only borrow it.
#if EGM_ALLOC_TORCH_HAS_SHARED_POOL_ALLOCATORS
using PoolAllocator = std::shared_ptr<cca::CUDAAllocator>;
inline PoolAllocator as_pool_allocator(PoolAllocator allocator) { return allocator; }
#else
using PoolAllocator = cca::CUDAAllocator*;
inline PoolAllocator as_pool_allocator(const std::shared_ptr<cca::CUDAAllocator>& allocator) {
  return allocator.get();
}
#endif

// The segments of a pool, or all for {0, 0}, without the recorded history where torch can omit it.
inline std::vector<cca::SegmentInfo> segments_of(cca::CUDAAllocator& allocator,
                                                 c10::MempoolId_t id) {
#if EGM_ALLOC_TORCH_HAS_SNAPSHOT_INCLUDE_TRACES
  return allocator.snapshot(id, /*include_traces=*/false).segments;
#else
  return allocator.snapshot(id).segments;
#endif
}

class DelegatingAllocator : public cca::CUDAAllocator {
 public:
  explicit DelegatingAllocator(cca::CUDAAllocator* target) : target_(target) {}

  cca::CUDAAllocator* target() const { return target_; }

  // c10::Allocator
  c10::DataPtr allocate(size_t n) override { return target_->allocate(n); }
  bool is_simple_data_ptr(const c10::DataPtr& ptr) const override {
    return target_->is_simple_data_ptr(ptr);
  }
  c10::DeleterFnPtr raw_deleter() const override { return target_->raw_deleter(); }
  void copy_data(void* dest, const void* src, std::size_t count) const override {
    target_->copy_data(dest, src, count);
  }

  // c10::DeviceAllocator
  bool initialized() override { return target_->initialized(); }
  void emptyCache(c10::MempoolId_t id = {0, 0}) override { target_->emptyCache(id); }
  void recordStream(const c10::DataPtr& ptr, c10::Stream stream) override {
    target_->recordStream(ptr, stream);
  }
  cca::DeviceStats getDeviceStats(c10::DeviceIndex device) override {
    return target_->getDeviceStats(device);
  }
  void resetAccumulatedStats(c10::DeviceIndex device) override {
    target_->resetAccumulatedStats(device);
  }
  void resetPeakStats(c10::DeviceIndex device) override { target_->resetPeakStats(device); }
  std::pair<size_t, size_t> getMemoryInfo(c10::DeviceIndex device) override {
    return target_->getMemoryInfo(device);
  }

  // CUDAAllocator: memory
  void* raw_alloc(size_t nbytes) override { return target_->raw_alloc(nbytes); }
  void* raw_alloc_with_stream(size_t nbytes, cudaStream_t stream) override {
    return target_->raw_alloc_with_stream(nbytes, stream);
  }
  void raw_delete(void* ptr) override { target_->raw_delete(ptr); }
  void init(int device_count) override { target_->init(device_count); }
  void enable(bool value) override { target_->enable(value); }
  bool isEnabled() const override { return target_->isEnabled(); }
  void recordStream(const c10::DataPtr& ptr, c10::cuda::CUDAStream stream) override {
    target_->recordStream(ptr, stream);
  }
  std::string name() override { return target_->name(); }

  // CUDAAllocator: limits and figures
  double getMemoryFraction(c10::DeviceIndex device) override {
    return target_->getMemoryFraction(device);
  }
  void setMemoryFraction(double fraction, c10::DeviceIndex device) override {
    target_->setMemoryFraction(fraction, device);
  }
  std::vector<cca::StreamSegmentSize> getExpandableSegmentSizes(c10::DeviceIndex device) override {
    return target_->getExpandableSegmentSizes(device);
  }
  void cacheInfo(c10::DeviceIndex device, size_t* largest) override {
    target_->cacheInfo(device, largest);
  }
  void* getBaseAllocation(void* ptr, size_t* size) override {
    return target_->getBaseAllocation(ptr, size);
  }

  // CUDAAllocator: pools
  void beginAllocateToPool(c10::DeviceIndex device, c10::MempoolId_t id,
                           std::function<bool(cudaStream_t)> filter) override {
    target_->beginAllocateToPool(device, id, std::move(filter));
  }
  void endAllocateToPool(c10::DeviceIndex device, c10::MempoolId_t id) override {
    target_->endAllocateToPool(device, id);
  }
  void releasePool(c10::DeviceIndex device, c10::MempoolId_t id) override {
    target_->releasePool(device, id);
  }
  int getPoolUseCount(c10::DeviceIndex device, c10::MempoolId_t id) override {
    return target_->getPoolUseCount(device, id);
  }
  void createOrIncrefPool(c10::DeviceIndex device, c10::MempoolId_t id,
                          PoolAllocator allocator = nullptr) override {
    target_->createOrIncrefPool(device, id, std::move(allocator));
  }
#if EGM_ALLOC_TORCH_HAS_SET_USE_ON_OOM_VALUE
  void setUseOnOOM(c10::DeviceIndex device, c10::MempoolId_t id, bool use_on_oom) override {
    target_->setUseOnOOM(device, id, use_on_oom);
  }
#else
  void setUseOnOOM(c10::DeviceIndex device, c10::MempoolId_t id) override {
    target_->setUseOnOOM(device, id);
  }
#endif
  void setNoSplit(c10::DeviceIndex device, c10::MempoolId_t id) override {
    target_->setNoSplit(device, id);
  }
  bool checkPoolLiveAllocations(c10::DeviceIndex device, c10::MempoolId_t id,
                                const std::unordered_set<void*>& expected) override {
    return target_->checkPoolLiveAllocations(device, id, expected);
  }
  std::shared_ptr<cca::AllocatorState> getCheckpointState(c10::DeviceIndex device,
                                                          c10::MempoolId_t id) override {
    return target_->getCheckpointState(device, id);
  }
  cca::CheckpointDelta setCheckpointPoolState(c10::DeviceIndex device,
                                              std::shared_ptr<cca::AllocatorState> state) override {
    return target_->setCheckpointPoolState(device, std::move(state));
  }

  // CUDAAllocator: between processes and devices
  cca::ShareableHandle shareIpcHandle(void* ptr) override { return target_->shareIpcHandle(ptr); }
  std::shared_ptr<void> getIpcDevPtr(std::string handle) override {
    return target_->getIpcDevPtr(std::move(handle));
  }
  void enablePeerAccess(c10::DeviceIndex device, c10::DeviceIndex device_to_access) override {
    target_->enablePeerAccess(device, device_to_access);
  }
  cudaError_t memcpyAsync(void* dst, int dst_device, const void* src, int src_device, size_t count,
                          cudaStream_t stream, bool p2p_enabled) override {
    return target_->memcpyAsync(dst, dst_device, src, src_device, count, stream, p2p_enabled);
  }

  // CUDAAllocator: history and observers
#if EGM_ALLOC_TORCH_HAS_SNAPSHOT_INCLUDE_TRACES
  cca::SnapshotInfo snapshot(c10::MempoolId_t id = {0, 0}, bool include_traces = true) override {
    return target_->snapshot(id, include_traces);
  }
#else
  cca::SnapshotInfo snapshot(c10::MempoolId_t id = {0, 0}) override {
    return target_->snapshot(id);
  }
#endif
  bool isHistoryEnabled() override { return target_->isHistoryEnabled(); }
#if EGM_ALLOC_TORCH_HAS_RECORD_HISTORY_SKIP_ACTIONS
  void recordHistory(bool enabled, cca::CreateContextFn recorder, size_t max_entries,
                     cca::RecordContext when, bool clear_history,
                     const std::vector<std::string>& skip_actions) override {
    target_->recordHistory(enabled, recorder, max_entries, when, clear_history, skip_actions);
  }
#else
  void recordHistory(bool enabled, cca::CreateContextFn recorder, size_t max_entries,
                     cca::RecordContext when, bool clear_history) override {
    target_->recordHistory(enabled, recorder, max_entries, when, clear_history);
  }
#endif
  void recordAnnotation(const std::vector<std::pair<std::string, std::string>>& md) override {
    target_->recordAnnotation(md);
  }
  void pushCompileContext(std::string& md) override { target_->pushCompileContext(md); }
  void popCompileContext() override { target_->popCompileContext(); }
  void setUserMetadata(const std::string& metadata) override { target_->setUserMetadata(metadata); }
  std::string getUserMetadata() override { return target_->getUserMetadata(); }
  void attachOutOfMemoryObserver(cca::OutOfMemoryObserver observer) override {
    target_->attachOutOfMemoryObserver(std::move(observer));
  }
  void attachAllocatorTraceTracker(cca::AllocatorTraceTracker tracker) override {
    target_->attachAllocatorTraceTracker(std::move(tracker));
  }

  // CUDAAllocator: what only some torch versions declare
#if EGM_ALLOC_TORCH_HAS_ATTACH_OOM_REJECTION_OBSERVER
  void attachOomRejectionObserver(cca::OomRejectionObserver observer) override {
    target_->attachOomRejectionObserver(std::move(observer));
  }
#endif
#if EGM_ALLOC_TORCH_HAS_GET_CONTEXT_FOR_POINTER
  std::shared_ptr<c10::GatheredContext> getContextForPointer(const void* ptr) override {
    return target_->getContextForPointer(ptr);
  }
#endif
#if EGM_ALLOC_TORCH_HAS_MARK_CAPTURE_BEGIN
  void markCaptureBegin(c10::DeviceIndex device) override { target_->markCaptureBegin(device); }
#endif
#if EGM_ALLOC_TORCH_HAS_MARK_CAPTURE_END
  void markCaptureEnd(c10::DeviceIndex device) override { target_->markCaptureEnd(device); }
#endif
#if EGM_ALLOC_TORCH_HAS_ALLOCATE_WITH_ADDRESS
  c10::DataPtr allocateWithAddress(size_t size, void* address) override {
    return target_->allocateWithAddress(size, address);
  }
#endif
#if EGM_ALLOC_TORCH_HAS_SUPPORTS_USER_METADATA
  bool supportsUserMetadata() override { return target_->supportsUserMetadata(); }
#endif
#if EGM_ALLOC_TORCH_HAS_ANNOTATE_MEMORY
  void annotateMemory(const void* ptr, const std::string& metadata) override {
    target_->annotateMemory(ptr, metadata);
  }
#endif

 private:
  cca::CUDAAllocator* const target_;
};

}  // namespace egm
