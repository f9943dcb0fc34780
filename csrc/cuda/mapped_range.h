// Memory mapped chunk by chunk into one range of addresses, each chunk in HBM or on the host (CUDA
// Driver API, "Virtual Memory Management"). The backings `numa` and `split` are made of these.
// Chunks are of one size, but in a range whose head is in HBM and whose tail comes from a stock:
// there the tail is in the stock's pieces, which are large, because many small ones take longer.
//
// What the driver does, on which this relies:
// - A mapping keeps its physical memory alive, so handles are released once mapped.
// - Unmapping does not wait for kernels: whoever unmaps has waited.
// - Access is per device and lost when a chunk is unmapped.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <vector>

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
  Bytes on_device() const;
  // Whether set_device_part(device_part) would move nothing.
  bool has_device_part(Bytes device_part) const;

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
  void divide(Bytes device_part, SplitLayout layout, const HostStock* stock, Bytes unit);
  CUdeviceptr at(size_t chunk) const { return base_ + edges_[chunk].count(); }
  Bytes size_of(size_t chunk) const { return edges_[chunk + 1] - edges_[chunk]; }
  Bytes total() const { return edges_.back(); }
  size_t chunks_of(Bytes part) const;
  void map_all(HostStock* stock);
  Bytes move_chunk(size_t chunk, bool to_device);
  void set_access(CUdeviceptr at, Bytes size) const;
  CUresult try_set_access(CUdeviceptr at, Bytes size) const noexcept;

  const DeviceIndex device_;
  const Bytes size_;
  std::vector<DeviceIndex> readers_;
  int host_node_ = -1;
  // Where chunks begin, and where the last one ends.
  std::vector<Bytes> edges_{Bytes(0)};
  size_t chunks_ = 0;
  // The first `device_chunks_` in `order_` are in HBM.
  std::vector<size_t> order_;
  size_t device_chunks_ = 0;
  size_t mapped_ = 0;
  CUdeviceptr base_ = 0;
};

}  // namespace egm
