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

#include "core/state.h"
#include "cuda/errors.h"
#include "cuda/guards.h"
#include "cuda/host_books.h"
#include "cuda/host_reserve.h"
#include "cuda/mapped_range.h"

namespace egm {
namespace {

struct Known {
  template <typename... Arguments>
  explicit Known(const Arguments&... arguments) : range(arguments...) {}

  MappedRange range;
  // Held while it is changed or released, which may take long; taken before the registry's.
  std::mutex changing;
};

// A leaf lock over the tables; ranges are made and released outside of it. Leaked like State.
struct Registry {
  using Ranges = std::map<const void*, std::shared_ptr<Known>>;

  std::mutex mutex;
  Ranges ranges;
  std::array<std::vector<DeviceIndex>, kMaxDevices> readers;
};

Registry& registry() {
  static Registry* const instance = new Registry;
  return *instance;
}

std::shared_ptr<Known> find(const void* base) {
  auto& all = registry();
  std::lock_guard<std::mutex> lock(all.mutex);
  const auto found = all.ranges.find(base);
  return found == all.ranges.end() ? nullptr : found->second;
}

Registry::Ranges::node_type take(const void* base) {
  auto& all = registry();
  std::lock_guard<std::mutex> lock(all.mutex);
  return all.ranges.extract(base);
}

std::vector<DeviceIndex> readers_of(DeviceIndex owner) {
  auto& all = registry();
  std::lock_guard<std::mutex> lock(all.mutex);
  return all.readers.at(static_cast<size_t>(owner));
}

}  // namespace

void* new_range(Bytes size, Bytes device_part, SplitLayout layout, DeviceIndex device) {
  auto allowed = readers_of(device);
  auto made = std::make_shared<Known>(size, device_part, layout, device, allowed);
  void* const base = made->range.base();
  auto& all = registry();
  while (true) {
    {
      std::lock_guard<std::mutex> lock(all.mutex);
      if (all.readers.at(static_cast<size_t>(device)) == allowed) {
        all.ranges.emplace(base, std::move(made));
        return base;
      }
    }
    // Whoever was allowed since; what fails here ends the range, which nobody knows of yet.
    allowed = readers_of(device);
    for (const DeviceIndex reader : allowed) made->range.allow(reader);
  }
}

cudaError_t free_range(void* base) noexcept {
  // Taken out first: once its addresses are given back, a new range may have them.
  auto taken = take(base);
  if (taken.empty()) return cudaErrorInvalidValue;
  const auto known = taken.mapped();
  std::lock_guard<std::mutex> changing(known->changing);
  const cudaError_t status = known->range.release();
  if (status == cudaSuccess) return status;
  auto& all = registry();
  std::lock_guard<std::mutex> lock(all.mutex);
  all.ranges.insert(std::move(taken));
  return status;
}

void allow_peer(DeviceIndex reader, DeviceIndex owner) {
  std::vector<std::shared_ptr<Known>> ranges;
  {
    auto& all = registry();
    std::lock_guard<std::mutex> lock(all.mutex);
    auto& readers = all.readers.at(static_cast<size_t>(owner));
    if (std::find(readers.begin(), readers.end(), reader) == readers.end()) {
      readers.push_back(reader);
    }
    for (const auto& [base, known] : all.ranges) {
      if (known->range.device() == owner) ranges.push_back(known);
    }
  }
  // One that fails does not keep the others from it: torch asks once per pair of devices, and from
  // then on takes access for given, whatever comes of it.
  std::exception_ptr failure;
  for (const auto& known : ranges) {
    std::lock_guard<std::mutex> changing(known->changing);
    try {
      known->range.allow(reader);
    } catch (const CudaError&) {
      failure = std::current_exception();
    }
  }
  if (failure) std::rethrow_exception(failure);
}

std::optional<RangeParts> range_parts(const void* base) {
  const auto known = find(base);
  if (known == nullptr) return std::nullopt;
  return RangeParts{known->range.on_device(), known->range.on_host()};
}

Bytes set_device_part(void* base, Bytes device_part, const std::atomic<bool>* give_up) {
  const auto known = find(base);
  if (known == nullptr) return Bytes(0);
  MappedRange& range = known->range;
  // Asked for each reuse of a split segment: what needs no move waits for nobody else's.
  const Bytes wanted = range.on_device_with(device_part);
  const Bytes found = range.on_device();
  if (wanted == found) return Bytes(0);
  // Before the lock: it may have to wait for others.
  HostClaim claim(Request{difference_or_zero(found, wanted), range.device()}, on_host_node(),
                  give_up);
  std::unique_lock<std::mutex> lock(known->changing);
  if (find(base) != known) return Bytes(0);
  const Bytes before = range.on_host();
  const Bytes device_before = range.on_device();
  Bytes moved;
  std::exception_ptr failure;
  try {
    DeviceScope device(range.device());
    // A capture of another device's stream is not broken by it.
    RelaxedCaptureScope relaxed;
    check(cudaDeviceSynchronize(), "cudaDeviceSynchronize", device_part, range.device());
    moved = range.set_device_part(device_part);
  } catch (const CudaError&) {
    failure = std::current_exception();
  }
  // As far as it came.
  const Bytes after = range.on_host();
  state().ledger.mapped_in_hbm_changed(range.device(), device_before, range.on_device());
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
