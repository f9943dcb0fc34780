// What managed memory may still take of the host.
#include "cuda/managed_promise.h"

#include <cuda_runtime_api.h>

#include <array>
#include <atomic>

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

}  // namespace

bool stays_within_hbm(const Request& request, const Placement& placement) {
  // Asked for here, so that whoever takes what is added later need not ask CUDA.
  const Bytes total = hbm_total(request.device);
  auto& otherwise = hbm_of(request.device).otherwise_bytes;
  if (request.hbm_otherwise) otherwise = request.hbm_otherwise->count();
  if (prefers_host(placement)) return false;
  const Bytes managed = state().ledger.counters(request.device, BackingKind::kManaged).reserved;
  return managed + Bytes(otherwise) <= total;
}

Bytes& ManagedPromise::unpopulated(Sums& sums, const Placement& placement) {
  return prefers_host(placement) ? sums.prefers_host_unpopulated : sums.other_unpopulated;
}

void ManagedPromise::add(Sums& sums, Bytes size, const Placement& placement) {
  unpopulated(sums, placement) = unpopulated(sums, placement) + size;
  if (!prefers_host(placement)) sums.other_total = sums.other_total + size;
}

Bytes ManagedPromise::promised(DeviceIndex device, const Sums& sums) {
  return promised_to_host(sums.prefers_host_unpopulated, sums.other_total, sums.other_unpopulated,
                          Bytes(hbm_of(device).otherwise_bytes), hbm_total(device));
}

void ManagedPromise::add(const Segment& segment) {
  add(sums_[segment.device], segment.size, segment.placement);
  known_[segment.base] = {segment, segment.size, ++numbers_};
}

void ManagedPromise::remove(const Segment& segment) {
  const auto found = known_.find(segment.base);
  if (found == known_.end()) return;
  Sums& sums = sums_[segment.device];
  Bytes& sum = unpopulated(sums, segment.placement);
  sum = sum - found->second.unpopulated;
  if (!prefers_host(segment.placement)) sums.other_total = sums.other_total - segment.size;
  known_.erase(found);
}

Bytes ManagedPromise::total() const {
  Bytes sum;
  for (const auto& [device, sums] : sums_) sum = saturated_sum(sum, promised(device, sums));
  return sum;
}

Bytes ManagedPromise::with(const Request& request, const Placement& placement) const {
  const auto found = sums_.find(request.device);
  Sums sums = found == sums_.end() ? Sums() : found->second;
  const Bytes before = promised(request.device, sums);
  add(sums, request.size, placement);
  return promised(request.device, sums) - before;
}

std::vector<ManagedPromise::Answer> ManagedPromise::questions() const {
  std::vector<Answer> answers;
  answers.reserve(known_.size());
  for (const auto& [base, known] : known_) {
    answers.push_back({base, known.number, known.segment.size, Bytes(0)});
  }
  return answers;
}

void ManagedPromise::ask(std::vector<Answer>& answers) {
  for (Answer& answer : answers) answer.unpopulated = estimate_unmapped(answer.base, answer.size);
}

void ManagedPromise::apply(const std::vector<Answer>& answers) {
  for (const Answer& answer : answers) {
    const auto found = known_.find(answer.base);
    if (found == known_.end() || found->second.number != answer.number) continue;
    const Segment& segment = found->second.segment;
    Bytes& sum = unpopulated(sums_[segment.device], segment.placement);
    sum = sum - found->second.unpopulated + answer.unpopulated;
    found->second.unpopulated = answer.unpopulated;
  }
}

}  // namespace egm
