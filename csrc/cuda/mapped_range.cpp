// Memory mapped chunk by chunk.
#include "cuda/mapped_range.h"

#include <cuda_runtime_api.h>

#include <algorithm>
#include <array>
#include <deque>
#include <optional>

#include "cuda/driver.h"
#include "cuda/errors.h"
#include "cuda/host_stock.h"
#include "cuda/physical.h"

namespace egm {
namespace {

// A second address for physical memory, for the time of a copy.
class Window {
 public:
  Window(const Physical& physical, Bytes size, DeviceIndex device) : size_(size) {
    check(driver().address_reserve(&base_, size.count(), 0, 0, 0), "cuMemAddressReserve", size,
          device);
    const CUresult status = driver().map(base_, size.count(), 0, physical.handle(), 0);
    if (status != CUDA_SUCCESS) driver().address_free(base_, size.count());
    check(status, "cuMemMap", size, device);
  }
  ~Window() {
    driver().unmap(base_, size_.count());
    driver().address_free(base_, size_.count());
  }
  Window(const Window&) = delete;
  Window& operator=(const Window&) = delete;
  CUdeviceptr base() const { return base_; }

 private:
  CUdeviceptr base_ = 0;
  const Bytes size_;
};

void map_at(CUdeviceptr at, Bytes size, CUmemGenericAllocationHandle physical, DeviceIndex device) {
  check(driver().map(at, size.count(), 0, physical, 0), "cuMemMap", size, device);
}

}  // namespace

// What is all in HBM needs nothing of the host.
MappedRange::Supply MappedRange::supply_for(Bytes size, Bytes device_part, DeviceIndex device) {
  if (device_part >= size) return {-1, granularity_of(device, std::nullopt), nullptr};
  const int host_node = host_node_of(device);
  return {host_node, granularity_of(device, host_node), HostStock::of_this_thread(device)};
}

Chunks MappedRange::chunks_for(Bytes size, Bytes device_part, SplitLayout layout,
                               const Supply& supply) {
  const auto piece = supply.stock != nullptr ? std::optional(supply.stock->piece()) : std::nullopt;
  return {size, device_part, layout, supply.unit, piece};
}

Bytes MappedRange::from_stock(Bytes size, Bytes device_part, SplitLayout layout,
                              DeviceIndex device) {
  const Supply supply = supply_for(size, device_part, device);
  if (supply.stock == nullptr) return Bytes(0);
  const Chunks chunks = chunks_for(size, device_part, layout, supply);
  Bytes sum;
  for (size_t rank = chunks.within(device_part); rank < chunks.count(); ++rank) {
    const Bytes chunk = chunks.size(chunks.at_rank(rank));
    if (chunk == supply.stock->piece()) sum = sum + chunk;
  }
  return sum;
}

MappedRange::MappedRange(Bytes size, Bytes device_part, SplitLayout layout, DeviceIndex device,
                         const std::vector<DeviceIndex>& peers)
    : MappedRange(size, device_part, layout, device, peers, supply_for(size, device_part, device)) {
}

MappedRange::MappedRange(Bytes size, Bytes device_part, SplitLayout layout, DeviceIndex device,
                         const std::vector<DeviceIndex>& peers, const Supply& supply)
    : device_(device),
      readers_(peers),
      host_node_(supply.host_node),
      chunks_(chunks_for(size, device_part, layout, supply)),
      device_chunks_(chunks_.within(device_part)) {
  readers_.insert(readers_.begin(), device);
  check(driver().address_reserve(&base_, chunks_.total().count(), supply.unit.count(), 0, 0),
        "cuMemAddressReserve", chunks_.total(), device);
  try {
    map_all(supply.stock);
    set_access(base_, chunks_.total());
  } catch (...) {
    release();
    throw;
  }
}

void MappedRange::map_all(HostStock* stock) {
  std::deque<Physical> physical;
  std::vector<CUmemGenericAllocationHandle> handles(chunks_.count());
  DriverPauses pauses;
  // HBM first: it is the scarcer, and taking host memory takes long.
  for (size_t rank = 0; rank < chunks_.count(); ++rank) {
    const size_t chunk = chunks_.at_rank(rank);
    const bool on_device = rank < device_chunks_;
    const bool as_stocked = !on_device && stock != nullptr && chunks_.size(chunk) == stock->piece();
    if (const auto stocked = as_stocked ? stock->take() : std::nullopt) {
      physical.emplace_back(*stocked);
    } else {
      physical.emplace_back(chunks_.size(chunk), Site{device_, on_device, host_node_});
      if (!on_device) pauses.after(chunks_.size(chunk));
    }
    handles[chunk] = physical.back().handle();
  }
  for (; mapped_ < chunks_.count(); ++mapped_) {
    map_at(at(mapped_), chunks_.size(mapped_), handles[mapped_], device_);
  }
}

MappedRange::~MappedRange() { release(); }

cudaError_t MappedRange::release() noexcept {
  if (mapped_ > 0) {
    const CUresult status = driver().unmap(base_, chunks_.start(mapped_).count());
    if (status != CUDA_SUCCESS) return runtime_status(status);
    mapped_ = 0;
  }
  if (base_ != 0) {
    const CUresult status = driver().address_free(base_, chunks_.total().count());
    if (status != CUDA_SUCCESS) return runtime_status(status);
    base_ = 0;
  }
  return cudaSuccess;
}

CUresult MappedRange::try_set_access(CUdeviceptr at, Bytes size) const noexcept {
  std::array<CUmemAccessDesc, kMaxDevices> descriptions{};
  for (size_t index = 0; index < readers_.size(); ++index) {
    descriptions[index].location.type = CU_MEM_LOCATION_TYPE_DEVICE;
    descriptions[index].location.id = readers_[index];
    descriptions[index].flags = CU_MEM_ACCESS_FLAGS_PROT_READWRITE;
  }
  return driver().set_access(at, size.count(), descriptions.data(), readers_.size());
}

void MappedRange::set_access(CUdeviceptr at, Bytes size) const {
  check(try_set_access(at, size), "cuMemSetAccess", size, device_);
}

void MappedRange::allow(DeviceIndex peer) {
  // Unmapped: release() has come halfway.
  if (mapped_ == 0) return;
  if (std::find(readers_.begin(), readers_.end(), peer) != readers_.end()) return;
  readers_.push_back(peer);
  try {
    set_access(base_, chunks_.total());
  } catch (...) {
    readers_.pop_back();
    throw;
  }
}

Bytes MappedRange::set_device_part(Bytes device_part) {
  const size_t wanted = chunks_.within(device_part);
  if (wanted < chunks_.count() && host_node_ < 0) host_node_ = host_node_of(device_);
  Bytes moved;
  DriverPauses pauses;
  const auto move = [&](size_t rank, bool to_device) {
    const Bytes size = move_chunk(chunks_.at_rank(rank), to_device);
    pauses.after(size);
    moved = moved + size;
  };
  for (; device_chunks_ < wanted; ++device_chunks_) move(device_chunks_, true);
  for (; device_chunks_ > wanted; --device_chunks_) move(device_chunks_ - 1, false);
  return moved;
}

Bytes MappedRange::move_chunk(size_t chunk, bool to_device) {
  const CUdeviceptr here = at(chunk);
  const Bytes size = chunks_.size(chunk);
  const Physical target(size, Site{device_, to_device, host_node_});
  {
    const Window window(target, size, device_);
    set_access(window.base(), size);
    check(cudaMemcpy(reinterpret_cast<void*>(window.base()), reinterpret_cast<const void*>(here),
                     size.count(), cudaMemcpyDefault),
          "cudaMemcpy", size, device_);
    check(cudaDeviceSynchronize(), "cudaDeviceSynchronize", size, device_);
  }
  // The old memory until the new is in its place: what fails in between is undone.
  CUmemGenericAllocationHandle old = 0;
  check(driver().retain(&old, reinterpret_cast<void*>(here)), "cuMemRetainAllocationHandle", size,
        device_);
  CUresult status = driver().unmap(here, size.count());
  if (status == CUDA_SUCCESS) {
    status = driver().map(here, size.count(), 0, target.handle(), 0);
    // A mapping without access would fault: also after undoing.
    if (status == CUDA_SUCCESS) {
      status = try_set_access(here, size);
      if (status != CUDA_SUCCESS) driver().unmap(here, size.count());
    }
    if (status != CUDA_SUCCESS) {
      driver().map(here, size.count(), 0, old, 0);
      try_set_access(here, size);
    }
  }
  driver().release(old);
  check(status, "remapping a chunk", size, device_);
  return size;
}

}  // namespace egm
