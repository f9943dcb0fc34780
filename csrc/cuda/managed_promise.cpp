// What managed memory may still take of the host.
#include "cuda/managed_promise.h"

#include <cuda_runtime_api.h>

#include <array>
#include <atomic>
#include <map>

#include "core/page_nodes.h"
#include "core/reserve.h"
#include "core/state.h"
#include "cuda/errors.h"

namespace egm {
namespace {

// Of each device, 0 where it is not known yet.
struct Hbm {
  std::atomic<uint64_t> total_bytes{0};
  std::atomic<uint64_t> otherwise_bytes{0};
};

Hbm& hbm_of(DeviceIndex device) {
  static auto* const all = new std::array<Hbm, kMaxDevices>;
  return all->at(static_cast<size_t>(device));
}

Bytes hbm_total(DeviceIndex device) {
  auto& total = hbm_of(device).total_bytes;
  if (total == 0) {
    cudaDeviceProp properties{};
    check(cudaGetDeviceProperties(&properties, device), "cudaGetDeviceProperties", Bytes(0),
          device);
    total = properties.totalGlobalMem;
  }
  return Bytes(total);
}

bool prefers_host(const Placement& placement) {
  return placement.advice.preferred_location == Location::kHost;
}

struct Managed {
  Bytes prefers_host_unpopulated;
  Bytes other_total;
  Bytes other_unpopulated;
};

void add(Managed& sum, Bytes size, Bytes unpopulated, const Placement& placement) {
  if (prefers_host(placement)) {
    sum.prefers_host_unpopulated = sum.prefers_host_unpopulated + unpopulated;
  } else {
    sum.other_total = sum.other_total + size;
    sum.other_unpopulated = sum.other_unpopulated + unpopulated;
  }
}

Bytes promised(const std::map<DeviceIndex, Managed>& managed) {
  Bytes sum;
  for (const auto& [device, each] : managed) {
    sum = sum + promised_to_host(each.prefers_host_unpopulated, each.other_total,
                                 each.other_unpopulated, Bytes(hbm_of(device).otherwise_bytes),
                                 hbm_total(device));
  }
  return sum;
}

}  // namespace

bool stays_within_hbm(const Request& request, const Placement& placement) {
  auto& otherwise = hbm_of(request.device).otherwise_bytes;
  if (request.hbm_otherwise) otherwise = request.hbm_otherwise->count();
  if (prefers_host(placement)) return false;
  const Bytes managed = state().ledger.counters(request.device, BackingKind::kManaged).reserved;
  return managed + Bytes(otherwise) <= hbm_total(request.device);
}

ManagedPromise managed_promise(const Request* request, const Placement* placement) {
  std::map<DeviceIndex, Managed> managed;
  for (const Segment& segment : state().segments.all()) {
    if (segment.placement.backing != BackingKind::kManaged) continue;
    add(managed[segment.device], segment.size, estimate_unmapped(segment.base, segment.size),
        segment.placement);
  }
  ManagedPromise promise{promised(managed), Bytes(0)};
  if (request != nullptr) {
    add(managed[request->device], request->size, request->size, *placement);
    promise.request = promised(managed) - promise.segments;
  }
  return promise;
}

}  // namespace egm
