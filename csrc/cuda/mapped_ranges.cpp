// The mapped ranges that exist.
#include "cuda/mapped_ranges.h"

#include <algorithm>
#include <array>
#include <exception>
#include <map>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "cuda/errors.h"
#include "cuda/guards.h"
#include "cuda/host_reserve.h"
#include "cuda/mapped_range.h"

namespace egm {
namespace {

// A leaf lock over the tables; ranges are made and released outside of it. Leaked like State.
struct Registry {
  std::mutex mutex;
  // Held while a range that exists is changed or released; taken before the other.
  std::mutex changing;
  std::map<const void*, std::shared_ptr<MappedRange>> ranges;
  std::array<std::vector<DeviceIndex>, kMaxDevices> readers;
};

Registry& registry() {
  static Registry* const instance = new Registry;
  return *instance;
}

std::shared_ptr<MappedRange> find(const void* base) {
  auto& all = registry();
  std::lock_guard<std::mutex> lock(all.mutex);
  const auto found = all.ranges.find(base);
  return found == all.ranges.end() ? nullptr : found->second;
}

std::vector<DeviceIndex> readers_of(DeviceIndex owner) {
  auto& all = registry();
  std::lock_guard<std::mutex> lock(all.mutex);
  return all.readers.at(static_cast<size_t>(owner));
}

}  // namespace

void* new_range(Bytes size, Bytes device_part, SplitLayout layout, DeviceIndex device) {
  auto range = std::make_shared<MappedRange>(size, device_part, layout, device, readers_of(device));
  void* const base = range->base();
  auto& all = registry();
  std::lock_guard<std::mutex> changing(all.changing);
  // Whoever was allowed since; what fails here ends the range, which nobody knows of yet.
  for (const DeviceIndex reader : readers_of(device)) range->allow(reader);
  std::lock_guard<std::mutex> lock(all.mutex);
  all.ranges.emplace(base, std::move(range));
  return base;
}

cudaError_t free_range(void* base) noexcept {
  auto& all = registry();
  std::lock_guard<std::mutex> changing(all.changing);
  const auto range = find(base);
  if (range == nullptr) return cudaErrorInvalidValue;
  const cudaError_t status = range->release();
  std::lock_guard<std::mutex> lock(all.mutex);
  if (status == cudaSuccess) all.ranges.erase(base);
  return status;
}

void allow_peer(DeviceIndex reader, DeviceIndex owner) {
  std::lock_guard<std::mutex> changing(registry().changing);
  std::vector<std::shared_ptr<MappedRange>> ranges;
  {
    auto& all = registry();
    std::lock_guard<std::mutex> lock(all.mutex);
    auto& readers = all.readers.at(static_cast<size_t>(owner));
    if (std::find(readers.begin(), readers.end(), reader) == readers.end()) {
      readers.push_back(reader);
    }
    for (const auto& [base, range] : all.ranges) {
      if (range->device() == owner) ranges.push_back(range);
    }
  }
  // One that fails does not keep the others from it: torch asks once per pair of devices, and from
  // then on takes access for given, whatever comes of it.
  std::exception_ptr failure;
  for (const auto& range : ranges) {
    try {
      range->allow(reader);
    } catch (const CudaError&) {
      failure = std::current_exception();
    }
  }
  if (failure) std::rethrow_exception(failure);
}

std::optional<RangeParts> range_parts(const void* base) {
  const auto range = find(base);
  if (range == nullptr) return std::nullopt;
  return RangeParts{range->on_device(), range->on_host()};
}

Bytes set_device_part(void* base, Bytes device_part, const std::atomic<bool>* give_up) {
  const auto range = find(base);
  if (range == nullptr) return Bytes(0);
  // Asked for each reuse of a split segment: what needs no move waits for nobody else's.
  const Bytes wanted = range->on_device_with(device_part);
  const Bytes found = range->on_device();
  if (wanted == found) return Bytes(0);
  // Before the lock: it may have to wait for others.
  HostClaim claim(Request{difference_or_zero(found, wanted), range->device()}, on_host_node(),
                  give_up);
  std::unique_lock<std::mutex> lock(registry().changing);
  if (find(base) != range) return Bytes(0);
  const Bytes before = range->on_host();
  Bytes moved;
  std::exception_ptr failure;
  try {
    DeviceScope device(range->device());
    check(cudaDeviceSynchronize(), "cudaDeviceSynchronize", device_part, range->device());
    moved = range->set_device_part(device_part);
  } catch (const CudaError&) {
    failure = std::current_exception();
  }
  // As far as it came.
  const Bytes after = range->on_host();
  lock.unlock();
  if (after > before) {
    claim.settle(after - before);
  } else {
    unbook_node(before - after);
  }
  if (failure) std::rethrow_exception(failure);
  return moved;
}

}  // namespace egm
