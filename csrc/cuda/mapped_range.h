// Memory mapped chunk by chunk into one range of addresses, each chunk in HBM or on the host (CUDA
// Driver API, "Virtual Memory Management"). The backings `numa` and `split` are made of these.
//
// What the driver does, on which this relies:
// - A mapping keeps its physical memory alive, so handles are released once mapped.
// - Unmapping does not wait for kernels: whoever unmaps has waited.
// - Access is per device and lost when a chunk is unmapped.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <atomic>
#include <vector>

#include "core/chunks.h"
#include "core/config.h"
#include "core/units.h"

namespace egm {

class HostStock;

class MappedRange {
 public:
  // Of `size` bytes `device_part`, in whole chunks, are in HBM of `device`; the rest is on the
  // host's NUMA node next to it, taken from this thread's stock if it has one. Throws CudaError
  // holding nothing.
  MappedRange(Bytes size, Bytes device_part, SplitLayout layout, DeviceIndex device,
              const std::vector<DeviceIndex>& peers);
  ~MappedRange();
  MappedRange(const MappedRange&) = delete;
  MappedRange& operator=(const MappedRange&) = delete;

  void* base() const { return reinterpret_cast<void*>(base_); }
  DeviceIndex device() const { return device_; }
  Bytes on_device() const { return chunks_.first(device_chunks_); }
  Bytes on_host() const { return mapped_ == 0 ? Bytes(0) : chunks_.total() - on_device(); }
  // What `on_device` would be after set_device_part(device_part).
  Bytes on_device_with(Bytes device_part) const {
    return chunks_.first(chunks_.within(device_part));
  }
  // What a new range takes from this thread's stock, if that has it.
  static Bytes from_stock(Bytes size, Bytes device_part, SplitLayout layout, DeviceIndex device);

  // Gives the memory and the addresses back. On failure what is left of them stays, and a further
  // call goes on from there.
  cudaError_t release() noexcept;

  // Lets another device use all of it that is mapped, as enablePeerAccess does for ordinary memory.
  void allow(DeviceIndex peer);
  // Moves chunks so that `device_part` bytes, rounded down to whole chunks, are in HBM.
  // Addresses and contents stay. The caller has seen to it that nobody uses the range. Returns the
  // bytes moved; on failure throws CudaError with the range whole, some chunks perhaps moved.
  Bytes set_device_part(Bytes device_part);

 private:
  // What a new range is made from.
  struct Supply {
    int host_node;  // -1 if it needs none
    Bytes unit;
    HostStock* stock;
  };
  static Supply supply_for(Bytes size, Bytes device_part, DeviceIndex device);
  static Chunks chunks_for(Bytes size, Bytes device_part, SplitLayout layout, const Supply& supply);
  MappedRange(Bytes size, Bytes device_part, SplitLayout layout, DeviceIndex device,
              const std::vector<DeviceIndex>& peers, const Supply& supply);
  CUdeviceptr at(size_t chunk) const { return base_ + chunks_.start(chunk).count(); }
  void map_all(HostStock* stock);
  Bytes move_chunk(size_t chunk, bool to_device);
  void set_access(CUdeviceptr at, Bytes size) const;
  CUresult try_set_access(CUdeviceptr at, Bytes size) const noexcept;

  const DeviceIndex device_;
  std::vector<DeviceIndex> readers_;
  int host_node_;
  const Chunks chunks_;
  // The first so many in the chunks' order are in HBM. These two are read while they change.
  std::atomic<size_t> device_chunks_;
  std::atomic<size_t> mapped_{0};
  CUdeviceptr base_ = 0;
};

}  // namespace egm
