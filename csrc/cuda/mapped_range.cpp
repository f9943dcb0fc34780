// Memory mapped chunk by chunk.
#include "cuda/mapped_range.h"

#include <cuda_runtime_api.h>

#include <algorithm>
#include <array>
#include <deque>
#include <numeric>
#include <optional>

#include "cuda/driver.h"
#include "cuda/errors.h"
#include "cuda/host_stock.h"
#include "cuda/physical.h"

namespace egm {
namespace {

// Chunks of a range at most, so that a huge one is up in reasonable time; arbitrary.
constexpr uint64_t kMostChunks = 1024;

// The order in which chunks come to HBM; those at its end are on the host. Counting with the bits
// of an index reversed spreads any number of the last ones evenly over all.
std::vector<size_t> order_of(size_t chunks, SplitLayout layout) {
  std::vector<size_t> order(chunks);
  std::iota(order.begin(), order.end(), size_t{0});
  if (layout == SplitLayout::kHead) return order;
  unsigned bits = 0;
  while ((size_t{1} << bits) < chunks) ++bits;
  std::vector<size_t> reversed(chunks);
  for (size_t index = 0; index < chunks; ++index) {
    for (unsigned bit = 0; bit < bits; ++bit) {
      if ((index >> bit & 1) != 0) reversed[index] |= size_t{1} << (bits - 1 - bit);
    }
  }
  std::sort(order.begin(), order.end(),
            [&](size_t left, size_t right) { return reversed[left] < reversed[right]; });
  return order;
}

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

MappedRange::MappedRange(Bytes size, Bytes device_part, SplitLayout layout, DeviceIndex device,
                         const std::vector<DeviceIndex>& peers)
    : device_(device), size_(size), readers_(peers) {
  readers_.insert(readers_.begin(), device);
  const bool any_on_host = device_part < size;
  if (any_on_host) host_node_ = host_node_of(device);
  const Bytes unit =
      granularity_of(device, any_on_host ? std::optional<int>(host_node_) : std::nullopt);
  HostStock* const stock = any_on_host ? HostStock::of_this_thread(device) : nullptr;
  divide(device_part, layout, stock, unit);
  order_ = order_of(chunks_, layout);
  device_chunks_ = chunks_of(device_part);
  check(driver().address_reserve(&base_, total().count(), unit.count(), 0, 0),
        "cuMemAddressReserve", total(), device);
  try {
    map_all(stock);
    set_access(base_, total());
  } catch (...) {
    release();
    throw;
  }
}

void MappedRange::divide(Bytes device_part, SplitLayout layout, const HostStock* stock,
                         Bytes unit) {
  Bytes chunk = round_up(Bytes(std::max<uint64_t>(1, size_.count() / kMostChunks)), unit);
  const auto add = [this](Bytes each, Bytes up_to) {
    while (total() + each <= up_to) edges_.push_back(total() + each);
  };
  if (stock != nullptr && layout == SplitLayout::kHead) {
    add(chunk, device_part);
    add(stock->piece(), size_);
    const Bytes rest = round_up(size_ - total(), unit);
    if (rest > Bytes(0)) edges_.push_back(total() + rest);
  } else {
    if (stock != nullptr) chunk = stock->piece();
    add(chunk, round_up(size_, chunk));
  }
  chunks_ = edges_.size() - 1;
}

void MappedRange::map_all(HostStock* stock) {
  std::deque<Physical> physical;
  std::vector<CUmemGenericAllocationHandle> handles(chunks_);
  // HBM first: it is the scarcer, and taking host memory takes long.
  for (size_t rank = 0; rank < chunks_; ++rank) {
    const size_t chunk = order_[rank];
    const bool on_device = rank < device_chunks_;
    const bool as_stocked = !on_device && stock != nullptr && size_of(chunk) == stock->piece();
    if (const auto stocked = as_stocked ? stock->take() : std::nullopt) {
      physical.emplace_back(*stocked);
    } else {
      physical.emplace_back(size_of(chunk), Site{device_, on_device, host_node_});
    }
    handles[chunk] = physical.back().handle();
  }
  for (; mapped_ < chunks_; ++mapped_) {
    map_at(at(mapped_), size_of(mapped_), handles[mapped_], device_);
  }
}

MappedRange::~MappedRange() { release(); }

// Rounded down; but all is all, though the last chunk may be larger than what is left for it.
size_t MappedRange::chunks_of(Bytes part) const {
  if (part >= size_) return chunks_;
  size_t count = 0;
  Bytes sum;
  while (count < chunks_ && sum + size_of(order_[count]) <= part) {
    sum = sum + size_of(order_[count++]);
  }
  return count;
}

Bytes MappedRange::on_device() const {
  Bytes sum;
  for (size_t rank = 0; rank < device_chunks_; ++rank) sum = sum + size_of(order_[rank]);
  return sum;
}

bool MappedRange::has_device_part(Bytes device_part) const {
  return chunks_of(device_part) == device_chunks_;
}

cudaError_t MappedRange::release() noexcept {
  if (mapped_ > 0) {
    const CUresult status = driver().unmap(base_, edges_[mapped_].count());
    if (status != CUDA_SUCCESS) return runtime_status(status);
    mapped_ = 0;
  }
  if (base_ != 0) {
    const CUresult status = driver().address_free(base_, total().count());
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
    set_access(base_, total());
  } catch (...) {
    readers_.pop_back();
    throw;
  }
}

Bytes MappedRange::set_device_part(Bytes device_part) {
  const size_t wanted = chunks_of(device_part);
  if (wanted < chunks_ && host_node_ < 0) host_node_ = host_node_of(device_);
  Bytes moved;
  for (; device_chunks_ < wanted; ++device_chunks_) {
    moved = moved + move_chunk(order_[device_chunks_], true);
  }
  for (; device_chunks_ > wanted; --device_chunks_) {
    moved = moved + move_chunk(order_[device_chunks_ - 1], false);
  }
  return moved;
}

Bytes MappedRange::move_chunk(size_t chunk, bool to_device) {
  const CUdeviceptr here = at(chunk);
  const Bytes size = size_of(chunk);
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
