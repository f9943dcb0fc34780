// What managed memory may still take of the host.
#include "cuda/managed_promise.h"

#include <cuda_runtime_api.h>

#include <algorithm>
#include <utility>

#include "core/page_nodes.h"
#include "cuda/errors.h"
#include "cuda/guards.h"
#include "cuda/traits.h"

namespace egm {
namespace {

bool prefers_host(const Placement& placement) {
  return placement.advice.preferred_location == Location::kHost;
}

uintptr_t number_of(const void* address) { return reinterpret_cast<uintptr_t>(address); }

// A prefetch of 200 GiB over PCIe takes about as long; work before it on its stream may take more.
constexpr auto kLongestMove = std::chrono::seconds(5);

}  // namespace

Bytes ManagedPromise::promised(const Sums& sums) {
  return promised_to_host(sums.bound_for_host, sums.other, sums.hbm, sums.hbm_of_others);
}

template <typename Change>
void ManagedPromise::change(Part& part, Change&& change) {
  Sums& sums = sums_[part.device];
  Bytes& before = sums.of(part.bound_for_host());
  before = before - part.off_host;
  change(part);
  Bytes& after = sums.of(part.bound_for_host());
  after = after + part.off_host;
}

void ManagedPromise::add(const Segment& segment) {
  Part& part = parts_[number_of(segment.base)];
  part = {segment.device, segment.size, prefers_host(segment.placement), {}, Bytes(0), ++numbers_};
  change(part, [](Part& fresh) { fresh.off_host = fresh.size; });
  Bytes& managed = sums_[segment.device].managed;
  managed = managed + segment.size;
}

void ManagedPromise::remove(const Segment& segment) {
  const auto begin = parts_.lower_bound(number_of(segment.base));
  const auto end = parts_.lower_bound(number_of(segment.base) + segment.size.count());
  if (begin == end) return;
  for (auto part = begin; part != end; ++part) {
    change(part->second, [](Part& gone) { gone.off_host = Bytes(0); });
  }
  parts_.erase(begin, end);
  Bytes& managed = sums_[segment.device].managed;
  managed = managed - segment.size;
}

Bytes ManagedPromise::total() const {
  Bytes sum;
  for (const auto& [device, sums] : sums_) sum = saturated_sum(sum, promised(sums));
  return sum;
}

Bytes ManagedPromise::with(const Request& request, const Placement& placement) const {
  const auto found = sums_.find(request.device);
  Sums sums = found == sums_.end() ? Sums() : found->second;
  const Bytes before = promised(sums);
  Bytes& sum = sums.of(prefers_host(placement));
  sum = sum + request.size;
  return promised(sums) - before;
}

void ManagedPromise::cut_at(uintptr_t address) {
  auto after = parts_.upper_bound(address);
  if (after == parts_.begin()) return;
  const auto& [begin, found] = *--after;
  Part& first = parts_[begin];
  const Bytes head(address - begin);
  if (head == Bytes(0) || head >= first.size) return;
  Part second = first;
  second.size = first.size - head;
  second.off_host = std::min(second.size, first.off_host);
  second.number = ++numbers_;
  first.size = head;
  first.off_host = first.off_host - second.off_host;
  first.number = ++numbers_;
  parts_.emplace(address, second);
}

std::pair<ManagedPromise::Parts::iterator, ManagedPromise::Parts::iterator> ManagedPromise::cut(
    const ManagedRange& range) {
  const uintptr_t begin = number_of(range.address);
  cut_at(begin);
  cut_at(begin + range.size.count());
  return {parts_.lower_bound(begin), parts_.lower_bound(begin + range.size.count())};
}

Bytes ManagedPromise::with_on_host(const ManagedRange& range) {
  const auto [begin, end] = cut(range);
  std::vector<Answer> answers;
  for (auto part = begin; part != end; ++part) answers.push_back(question(*part));
  ask(answers);
  apply(answers);
  Sums sums = sums_[range.device];
  const Bytes before = promised(sums);
  for (auto part = begin; part != end; ++part) {
    if (part->second.bound_for_host()) continue;
    sums.other = sums.other - part->second.off_host;
    sums.bound_for_host = sums.bound_for_host + part->second.off_host;
  }
  return promised(sums) - before;
}

void ManagedPromise::set_prefers_host(const ManagedRange& range, bool prefers) {
  const auto [begin, end] = cut(range);
  for (auto part = begin; part != end; ++part) {
    change(part->second, [prefers](Part& advised) { advised.prefers_host = prefers; });
  }
}

void ManagedPromise::set_moving(const ManagedRange& range, Location to) {
  const auto [begin, end] = cut(range);
  for (auto part = begin; part != end; ++part) {
    change(part->second, [to](Part& moved) {
      moved.moving_to_host_until = {};
      if (to == Location::kHost) moved.moving_to_host_until = Clock::now() + kLongestMove;
      if (to == Location::kDevice) moved.off_host = moved.size;
    });
  }
}

std::optional<ManagedPromise::View> ManagedPromise::look(DeviceIndex device) noexcept {
  try {
    const DeviceScope scope(device);
    const RelaxedCaptureScope relaxed;
    size_t free = 0;
    size_t total = 0;
    check(cudaMemGetInfo(&free, &total), "cudaMemGetInfo", Bytes(0), device);
    return View{device, Bytes(total), Bytes(free), hbm_numa_node(device)};
  } catch (const CudaError&) {
    return std::nullopt;
  }
}

void ManagedPromise::see(const View& view, std::optional<Bytes> of_torch) {
  Sums& sums = sums_[view.device];
  sums.is_told_of_torch = sums.is_told_of_torch || of_torch.has_value();
  const HbmUse now{view.total, view.free, of_torch.value_or(Bytes(0)), sums.managed};
  sums.hbm_of_others = hbm_of_others(sums.hbm_of_others, sums.hbm, now);
  sums.hbm = now;
  sums.numa_node = view.numa_node;
}

bool ManagedPromise::is_told_of_torch(DeviceIndex device) const {
  const auto found = sums_.find(device);
  return found != sums_.end() && found->second.is_told_of_torch;
}

ManagedPromise::Answer ManagedPromise::question(const Parts::value_type& part) const {
  const auto& [address, known] = part;
  return {address, known.number, known.size, sums_.at(known.device).numa_node, Bytes(0)};
}

std::vector<ManagedPromise::Answer> ManagedPromise::questions() const {
  std::vector<Answer> answers;
  answers.reserve(parts_.size());
  for (const auto& part : parts_) answers.push_back(question(part));
  return answers;
}

void ManagedPromise::ask(std::vector<Answer>& answers) {
  for (Answer& answer : answers) {
    answer.off_host = estimate_off_host(reinterpret_cast<const void*>(answer.address), answer.size,
                                        answer.hbm_node);
  }
}

void ManagedPromise::apply(const std::vector<Answer>& answers) {
  for (const Answer& answer : answers) {
    const auto found = parts_.find(answer.address);
    if (found == parts_.end() || found->second.number != answer.number) continue;
    change(found->second, [&](Part& part) {
      part.off_host = answer.off_host;
      const bool moves = answer.off_host > Bytes(0) && Clock::now() < part.moving_to_host_until;
      if (!moves) part.moving_to_host_until = {};
    });
  }
}

}  // namespace egm
