// Memory mapped chunk by chunk.
#include "cuda/mapped_range.h"

#include <cuda_runtime_api.h>

#include <algorithm>
#include <array>
#include <string>

#include "cuda/driver.h"
#include "cuda/errors.h"
#include "cuda/traits.h"

namespace egm {
namespace {

// Chunks of a range at most, so that a huge one is up in reasonable time; arbitrary.
constexpr uint64_t kMostChunks = 1024;

uint64_t round_up(uint64_t size, uint64_t unit) { return (size + unit - 1) / unit * unit; }

int host_node_of(DeviceIndex device) {
  int supported = 0;
  // The attribute is the driver's and has no name in the runtime.
  const auto name = static_cast<cudaDeviceAttr>(
      CU_DEVICE_ATTRIBUTE_HOST_NUMA_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED);
  if (cudaDeviceGetAttribute(&supported, name, device) != cudaSuccess) cudaGetLastError();
  if (supported == 0) {
    throw CudaError("device " + std::to_string(device) +
                        " or its driver cannot map memory of a host NUMA node "
                        "(CU_DEVICE_ATTRIBUTE_HOST_NUMA_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED is 0); "
                        "use the backing 'pinned' or 'managed'",
                    cudaErrorNotSupported);
  }
  return std::max(device_attribute(cudaDevAttrHostNumaId, device),
                  0);  // -1 on hosts without NUMA, where node 0 is all there is
}

CUmemAllocationProp properties(bool on_device, DeviceIndex device, int host_node) {
  CUmemAllocationProp result{};
  result.type = CU_MEM_ALLOCATION_TYPE_PINNED;
  result.location.type = on_device ? CU_MEM_LOCATION_TYPE_DEVICE : CU_MEM_LOCATION_TYPE_HOST_NUMA;
  result.location.id = on_device ? device : host_node;
  return result;
}

// Physical memory until it is mapped, or for the time it is held.
class Physical {
 public:
  Physical(Bytes size, const CUmemAllocationProp& properties, DeviceIndex device) {
    check(driver().create(&handle_, size.count(), &properties, 0), "cuMemCreate", size, device);
  }
  ~Physical() { driver().release(handle_); }
  Physical(const Physical&) = delete;
  Physical& operator=(const Physical&) = delete;
  CUmemGenericAllocationHandle handle() const { return handle_; }

 private:
  CUmemGenericAllocationHandle handle_ = 0;
};

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

void map_at(CUdeviceptr at, Bytes size, const Physical& physical, DeviceIndex device) {
  check(driver().map(at, size.count(), 0, physical.handle(), 0), "cuMemMap", size, device);
}

}  // namespace

MappedRange::MappedRange(Bytes size, Bytes device_part, DeviceIndex device,
                         const std::vector<DeviceIndex>& peers)
    : device_(device), size_(size), readers_(peers) {
  readers_.insert(readers_.begin(), device);
  const bool any_on_host = device_part < size;
  if (any_on_host) host_node_ = host_node_of(device);
  size_t granularity = 0;
  for (const bool on_device : {true, false}) {
    if (!on_device && !any_on_host) continue;
    const auto wanted = properties(on_device, device, host_node_);
    size_t unit = 0;
    check(driver().granularity(&unit, &wanted, CU_MEM_ALLOC_GRANULARITY_RECOMMENDED),
          "cuMemGetAllocationGranularity", size, device);
    granularity = std::max(granularity, unit);
  }
  chunk_ = Bytes(round_up(std::max<uint64_t>(1, size.count() / kMostChunks), granularity));
  chunks_ = round_up(size.count(), chunk_.count()) / chunk_.count();
  device_chunks_ = chunks_of(device_part);
  const size_t total = chunks_ * chunk_.count();
  check(driver().address_reserve(&base_, total, granularity, 0, 0), "cuMemAddressReserve",
        Bytes(total), device);
  try {
    // HBM first: it is the scarcer, and taking host memory takes long.
    for (size_t index = 0; index < chunks_; ++index) map_chunk(index, index < device_chunks_);
    set_access(base_, Bytes(total));
  } catch (...) {
    release();
    throw;
  }
}

MappedRange::~MappedRange() { release(); }

// Rounded down; but all is all, though the last chunk may be larger than what is left for it.
size_t MappedRange::chunks_of(Bytes part) const {
  return part >= size_ ? chunks_ : part.count() / chunk_.count();
}

cudaError_t MappedRange::release() noexcept {
  if (mapped_ > 0) {
    const CUresult status = driver().unmap(base_, mapped_ * chunk_.count());
    if (status != CUDA_SUCCESS) return runtime_status(status);
    mapped_ = 0;
  }
  if (base_ != 0) {
    const CUresult status = driver().address_free(base_, chunks_ * chunk_.count());
    if (status != CUDA_SUCCESS) return runtime_status(status);
    base_ = 0;
  }
  return cudaSuccess;
}

void MappedRange::map_chunk(size_t index, bool on_device) {
  const Physical physical(chunk_, properties(on_device, device_, host_node_), device_);
  map_at(base_ + index * chunk_.count(), chunk_, physical, device_);
  ++mapped_;
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
    set_access(base_, Bytes(chunks_ * chunk_.count()));
  } catch (...) {
    readers_.pop_back();
    throw;
  }
}

Bytes MappedRange::move_boundary(Bytes device_part) {
  const size_t wanted = chunks_of(device_part);
  if (wanted < chunks_ && host_node_ < 0) host_node_ = host_node_of(device_);
  size_t moved = 0;
  for (; device_chunks_ < wanted; ++device_chunks_, ++moved) move_chunk(device_chunks_, true);
  for (; device_chunks_ > wanted; --device_chunks_, ++moved) move_chunk(device_chunks_ - 1, false);
  return Bytes(moved * chunk_.count());
}

void MappedRange::move_chunk(size_t index, bool to_device) {
  const CUdeviceptr at = base_ + index * chunk_.count();
  const Physical target(chunk_, properties(to_device, device_, host_node_), device_);
  {
    const Window window(target, chunk_, device_);
    set_access(window.base(), chunk_);
    check(cudaMemcpy(reinterpret_cast<void*>(window.base()), reinterpret_cast<const void*>(at),
                     chunk_.count(), cudaMemcpyDefault),
          "cudaMemcpy", chunk_, device_);
    check(cudaDeviceSynchronize(), "cudaDeviceSynchronize", chunk_, device_);
  }
  // The old memory until the new is in its place: what fails in between is undone.
  CUmemGenericAllocationHandle old = 0;
  check(driver().retain(&old, reinterpret_cast<void*>(at)), "cuMemRetainAllocationHandle", chunk_,
        device_);
  CUresult status = driver().unmap(at, chunk_.count());
  if (status == CUDA_SUCCESS) {
    status = driver().map(at, chunk_.count(), 0, target.handle(), 0);
    // A mapping without access would fault: also after undoing.
    if (status == CUDA_SUCCESS) {
      status = try_set_access(at, chunk_);
      if (status != CUDA_SUCCESS) driver().unmap(at, chunk_.count());
    }
    if (status != CUDA_SUCCESS) {
      driver().map(at, chunk_.count(), 0, old, 0);
      try_set_access(at, chunk_);
    }
  }
  driver().release(old);
  check(status, "remapping a chunk", chunk_, device_);
}

}  // namespace egm
