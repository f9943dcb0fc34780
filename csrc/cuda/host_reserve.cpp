// The reserve, asked for each segment that takes host memory.
#include "cuda/host_reserve.h"

#include <cuda_runtime_api.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

#include "core/host_memory.h"
#include "core/reserve.h"
#include "core/state.h"
#include "cuda/errors.h"
#include "cuda/host_books.h"
#include "cuda/host_stock.h"
#include "cuda/managed_promise.h"
#include "cuda/mapped_range.h"
#include "cuda/traits.h"

namespace egm {

struct NoRoom {
  std::string why;
  // It would fit without the requests under way, which may have been counted twice.
  bool may_pass = false;
};

namespace {

bool may_be_of_carveout(BackingKind kind) {
  return kind == BackingKind::kNuma || kind == BackingKind::kSplit;
}

// What a stock of this thread's holds has been booked.
Bytes host_bytes_to_come(const Request& request, const Placement& placement) {
  const Bytes on_host = host_share(request.size, placement);
  if (!may_be_of_carveout(placement.backing)) return on_host;
  const HostStock* const stock = HostStock::of_this_thread(request.device);
  if (stock == nullptr) return on_host;
  const Bytes stocked = MappedRange::from_stock(request.size, request.size - on_host,
                                                placement.layout, request.device);
  stock->wait_for(stocked);
  return difference_or_zero(on_host, std::min(stocked, stock->held()));
}

// The tightest first, should there be more than there is room for.
void name_groups(Booking& own, const std::vector<MemoryLimit>& limits) {
  own.groups.fill(0);
  auto end = own.groups.begin();
  for (const MemoryLimit& limit : limits) {
    const bool known = std::find(own.groups.begin(), end, limit.group) != end;
    if (limit.group != 0 && !known && end != own.groups.end()) *end++ = limit.group;
  }
}

// What of others counts depends on the limit.
std::optional<NoRoom> refuse(ReserveQuestion question, const std::vector<MemoryLimit>& limits,
                             const std::vector<Booking>& others) {
  for (const MemoryLimit& limit : limits) {
    const Booking elsewhere = sum_within(others, limit.group);
    question.promised_elsewhere = elsewhere.promised;
    question.pending_elsewhere = elsewhere.pending;
    question.host = {limit.total, std::min(limit.available, limit.total), limit.name};
    if (const auto why = over_reserve(question)) {
      question.pending = question.pending_elsewhere = Bytes(0);
      return NoRoom{*why, !over_reserve(question)};
    }
  }
  return std::nullopt;
}

}  // namespace

HostClaim::HostClaim(const Request& request, const Placement& placement,
                     const std::atomic<bool>* give_up)
    : device_(request.device) {
  const bool managed = placement.backing == BackingKind::kManaged;
  if (!managed && host_share(request.size, placement) == Bytes(0)) return;
  const auto refusal = when_possible(give_up, [&] { return book(request, placement); });
  if (refusal) throw ReserveExceeded(refusal->why, refusal->may_pass);
}

HostClaim::HostClaim(const ManagedRange& range) : device_(range.device) {
  const auto promised = [&](ManagedPromise& promise) { return promise.with_on_host(range); };
  const auto refusal = when_possible(nullptr, [&] { return book(Bytes(0), false, promised); });
  if (refusal) throw ReserveExceeded(refusal->why, refusal->may_pass);
}

void HostClaim::wait_for_room(const Request& request, const Placement& placement) {
  HostClaim claim(request.device);
  when_possible(nullptr, [&] { return claim.book(request, placement); });
}

template <typename Book>
std::optional<NoRoom> HostClaim::when_possible(const std::atomic<bool>* give_up, const Book& book) {
  constexpr auto kLongestWait = std::chrono::minutes(1);
  constexpr auto kPause = std::chrono::milliseconds(10);
  const auto end = std::chrono::steady_clock::now() + kLongestWait;
  while (auto refusal = book()) {
    const bool given_up = give_up != nullptr && *give_up;
    if (given_up || !refusal->may_pass || std::chrono::steady_clock::now() >= end) return refusal;
    std::this_thread::sleep_for(kPause);
  }
  return std::nullopt;
}

std::optional<NoRoom> HostClaim::book(const Request& request, const Placement& placement) {
  if (placement.backing == BackingKind::kManaged) {
    see_hbm_without_torch(request.device);
    return book(Bytes(0), false,
                [&](ManagedPromise& promise) { return promise.with(request, placement); });
  }
  return book(host_bytes_to_come(request, placement), may_be_of_carveout(placement.backing), {});
}

std::optional<NoRoom> HostClaim::book(Bytes on_host, bool may_be_of_carveout,
                                      const Promised& managed) {
  Books& all = books();
  std::lock_guard<std::mutex> lock(all.mutex);
  // It stays within HBM, and others have nothing new to hear.
  if (managed && managed(all.promise) == Bytes(0) && all.promise.total() <= all.own.promised) {
    return std::nullopt;
  }
  const ProcessTable::Turn turn(all.table);
  if (may_be_of_carveout) {
    if (const auto carveout = egm_carveout()) return book_of_carveout(on_host, *carveout);
  }
  const auto others = all.table.others();
  const auto limits = host_limits(hbm_nodes());
  std::optional<NoRoom> refusal;
  ReserveQuestion question;
  question.pending = all.own.pending;
  question.reserve =
      state().config.get().host_reserve.value_or(default_reserve(least_total(limits).total));
  for (const bool asked_anew : {false, true}) {
    if (asked_anew) ask_about_promise(all);
    question.asked = managed ? managed(all.promise) : on_host;
    question.promised = all.promise.total();
    refusal.reset();
    // Else it stays within HBM.
    if (question.asked > Bytes(0)) refusal = refuse(question, limits, others);
    if (!refusal) break;
  }
  if (refusal) return refusal;
  pending_ = question.asked;
  all.own.pending = all.own.pending + pending_;
  name_groups(all.own, limits);
  publish(all);
  return std::nullopt;
}

// What a carve-out holds the kernel does not see.
std::optional<NoRoom> HostClaim::book_of_carveout(Bytes asked, Bytes carveout) {
  Books& all = books();
  const Bytes held = all.own.carveout;
  const Bytes elsewhere = sum_within(all.table.others(), 0).carveout;
  if (asked > difference_or_zero(difference_or_zero(carveout, held), elsewhere)) {
    return NoRoom{"the EGM carve-out of " + describe(carveout) + " leaves no room for " +
                  describe(asked) + ": " + describe(held) + " are held, and " +
                  describe(elsewhere) +
                  " by other processes. Free tensors, call torch.cuda.empty_cache(), or choose "
                  "another backing."};
  }
  carveout_ = asked;
  all.own.carveout = held + asked;
  publish(all);
  return std::nullopt;
}

void HostClaim::settle(Bytes of_node, const Segment* managed) {
  const bool booked = pending_ > Bytes(0);
  const Bytes passed = passed_by_stock();
  if (!booked && managed == nullptr && of_node == Bytes(0)) return;
  Books& all = books();
  std::lock_guard<std::mutex> lock(all.mutex);
  if (managed != nullptr) all.promise.add(*managed);
  all.own.carveout = all.own.carveout - carveout_ - passed + of_node;
  all.own.pending = all.own.pending - pending_;
  pending_ = carveout_ = Bytes(0);
  if (booked || passed > Bytes(0)) publish(all);
}

Bytes HostClaim::passed_by_stock() const noexcept {
  HostStock* const stock = HostStock::of_this_thread(device_);
  return stock != nullptr ? stock->pass_booking() : Bytes(0);
}

HostClaim::~HostClaim() {
  // Taken for a range that then could not be made.
  carveout_ = carveout_ + passed_by_stock();
  if (pending_ == Bytes(0) && carveout_ == Bytes(0)) return;
  Books& all = books();
  std::lock_guard<std::mutex> lock(all.mutex);
  all.own.pending = all.own.pending - pending_;
  all.own.carveout = all.own.carveout - carveout_;
  publish(all);
}

Placement on_host_node() {
  Placement placement;
  placement.backing = BackingKind::kNuma;
  return placement;
}

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
