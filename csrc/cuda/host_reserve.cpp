// The reserve, asked for each segment that takes host memory.
#include "cuda/host_reserve.h"

#include <cuda_runtime_api.h>

#include <map>
#include <mutex>

#include "core/page_nodes.h"
#include "core/reserve.h"
#include "core/state.h"
#include "cuda/errors.h"
#include "cuda/traits.h"

namespace egm {
namespace {

// Held while it is decided, so that two threads do not both get the last of it. Leaf lock.
struct Pending {
  std::mutex mutex;
  Bytes bytes;
};

Pending& pending() {
  static Pending* const instance = new Pending;
  return *instance;
}

Bytes hbm_total(DeviceIndex device) {
  static std::mutex mutex;
  static std::map<DeviceIndex, Bytes> known;
  std::lock_guard<std::mutex> lock(mutex);
  Bytes& total = known[device];
  if (total == Bytes(0)) {
    cudaDeviceProp properties{};
    check(cudaGetDeviceProperties(&properties, device), "cudaGetDeviceProperties", Bytes(0),
          device);
    total = Bytes(properties.totalGlobalMem);
  }
  return total;
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

std::map<DeviceIndex, Managed> managed_by_device() {
  std::map<DeviceIndex, Managed> result;
  for (const Segment& segment : state().segments.all()) {
    if (segment.placement.backing != BackingKind::kManaged) continue;
    add(result[segment.device], segment.size, estimate_unmapped(segment.base, segment.size),
        segment.placement);
  }
  return result;
}

// `request`, if any, tells what HBM of its device holds otherwise.
Bytes promised(const std::map<DeviceIndex, Managed>& managed, const Request* request) {
  Bytes sum;
  for (const auto& [device, each] : managed) {
    const Bytes otherwise =
        request != nullptr && request->device == device ? request->hbm_otherwise : Bytes(0);
    sum = sum + promised_to_host(each.prefers_host_unpopulated, each.other_total,
                                 each.other_unpopulated, otherwise, hbm_total(device));
  }
  return sum;
}

// What segments of a carve-out hold, of all devices: the kernel does not see it.
Bytes held_of_carveout() {
  Bytes sum;
  for (const Segment& segment : state().segments.all()) {
    if (segment.placement.backing == BackingKind::kNuma ||
        segment.placement.backing == BackingKind::kSplit) {
      sum = sum + host_share(segment.size, segment.placement);
    }
  }
  return sum;
}

// All that is managed on the device fits in its HBM, this request included, which the ledger has
// booked already: it promises nothing more. Quick, where asking each segment is not.
bool stays_within_hbm(const Request& request, const Placement& placement) {
  if (prefers_host(placement)) return false;
  const Bytes managed = state().ledger.counters(request.device, BackingKind::kManaged).reserved;
  return managed + request.hbm_otherwise <= hbm_total(request.device);
}

void refuse(const Request& request, const Placement& placement, const std::string& why) {
  state().ledger.refused_by_reserve(request.device, placement.backing);
  throw ReserveExceeded(why);
}

}  // namespace

HostClaim::HostClaim(const Request& request, const Placement& placement) {
  const bool managed = placement.backing == BackingKind::kManaged;
  const Bytes asked = host_share(request.size, placement);
  if (managed ? stays_within_hbm(request, placement) : asked == Bytes(0)) return;
  Pending& all = pending();
  std::lock_guard<std::mutex> lock(all.mutex);
  if (placement.backing == BackingKind::kNuma || placement.backing == BackingKind::kSplit) {
    if (const auto carveout = egm_carveout()) {
      const Bytes held = held_of_carveout() + all.bytes;
      if (held > *carveout || asked > *carveout - held) {
        refuse(request, placement,
               "the EGM carve-out of " + describe(*carveout) + " leaves no room for " +
                   describe(asked) + ": " + describe(held) +
                   " are held. Free tensors, call torch.cuda.empty_cache(), or choose another "
                   "backing.");
      }
      pending_ = asked;
      all.bytes = all.bytes + pending_;
      return;
    }
  }
  auto by_device = managed_by_device();
  ReserveQuestion question;
  question.promised = promised(by_device, &request);
  question.asked = asked;
  if (managed) {
    add(by_device[request.device], request.size, request.size, placement);
    question.asked = promised(by_device, &request) - question.promised;
    // It stays within HBM.
    if (question.asked == Bytes(0)) return;
  }
  question.pending = all.bytes;
  question.host = host_memory(hbm_nodes());
  question.reserve =
      state().config.get().host_reserve.value_or(default_reserve(question.host.total));
  if (const auto why = over_reserve(question)) refuse(request, placement, *why);
  // Managed memory is promised from the moment that it is in the table of segments.
  pending_ = asked;
  all.bytes = all.bytes + pending_;
}

HostClaim::~HostClaim() {
  if (pending_ == Bytes(0)) return;
  std::lock_guard<std::mutex> lock(pending().mutex);
  pending().bytes = pending().bytes - pending_;
}

Bytes promised_to_managed() { return promised(managed_by_device(), nullptr); }

std::set<int> hbm_nodes() {
  std::set<int> nodes;
  int count = 0;
  if (cudaGetDeviceCount(&count) != cudaSuccess) cudaGetLastError();
  for (int device = 0; device < count; ++device) {
    try {
      const int node = hbm_numa_node(device);
      if (node >= 0) nodes.insert(node);
    } catch (const CudaError&) {
      // It says nothing of a node.
    }
  }
  return nodes;
}

}  // namespace egm
