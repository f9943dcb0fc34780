// The reserve, asked for each segment that takes host memory.
#include "cuda/host_reserve.h"

#include <cuda_runtime_api.h>
#include <signal.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <memory>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

#include "core/host_memory.h"
#include "core/reserve.h"
#include "core/state.h"
#include "cuda/errors.h"
#include "cuda/managed_promise.h"
#include "cuda/traits.h"

namespace egm {
namespace {

bool may_be_of_carveout(BackingKind kind) {
  return kind == BackingKind::kNuma || kind == BackingKind::kSplit;
}

// What segments of a carve-out hold, of all devices: the kernel does not see it.
Bytes held_of_carveout() {
  Bytes sum;
  for (const Segment& segment : state().segments.all()) {
    if (may_be_of_carveout(segment.placement.backing)) {
      sum = sum + host_share(segment.size, segment.placement);
    }
  }
  return sum;
}

// What this process has booked. The mutex is held while it is decided, so that two threads do not
// both get the last of it. Leaf lock.
struct Books {
  explicit Books(pid_t process) : process(process) {}

  const pid_t process;
  std::mutex mutex;
  Booking own;
  // Of requests that are being served, within own.carveout.
  Bytes carveout_pending;
  ProcessTable table;
  bool refreshing = false;
};

// A forked child has neither its parent's bookings nor its threads, which may have held the mutex:
// it begins anew. Leaked like State.
Books& books() {
  static std::atomic<Books*> instance{nullptr};
  Books* found = instance.load();
  const pid_t process = getpid();
  if (found != nullptr && found->process == process) return *found;
  auto fresh = std::make_unique<Books>(process);
  // Else another thread was first.
  if (instance.compare_exchange_strong(found, fresh.get())) return *fresh.release();
  return *found;
}

void try_refresh(Books& all) noexcept;

// How far managed memory is populated changes without a call of ours. While there is a promise, a
// thread tells the others about once a second what is left of it. It calls neither CUDA nor torch,
// and uses nothing that is destroyed at exit.
void keep_promise_fresh() {
  while (true) {
    std::this_thread::sleep_for(std::chrono::seconds(1));
    Books& all = books();
    std::lock_guard<std::mutex> lock(all.mutex);
    try_refresh(all);
    all.refreshing = all.own.promised > Bytes(0);
    if (!all.refreshing) return;
  }
}

void start_refreshing(Books& all) {
  // The program's signals are for the program's threads.
  sigset_t every, before;
  sigfillset(&every);
  pthread_sigmask(SIG_SETMASK, &every, &before);
  try {
    std::thread(keep_promise_fresh).detach();
    all.refreshing = true;
  } catch (const std::system_error&) {
    // Then others see the promise as it is when this process next takes or gives back memory.
  }
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
}

// Under the mutex, and in a turn if it is more than before.
void publish(Books& all, const Booking& own) {
  all.table.publish(own);
  all.own = own;
  if (own.promised > Bytes(0) && !all.refreshing) start_refreshing(all);
}

// Under the mutex.
void try_refresh(Books& all) noexcept {
  try {
    Booking own = all.own;
    own.promised = managed_promise().segments;
    own.carveout = held_of_carveout() + all.carveout_pending;
    publish(all, own);
  } catch (const std::exception&) {
    // Others see what was, until the next time.
  }
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

}  // namespace

HostClaim::HostClaim(const Request& request, const Placement& placement) {
  constexpr auto kLongestWait = std::chrono::minutes(1);
  constexpr auto kPause = std::chrono::milliseconds(10);
  const bool managed = placement.backing == BackingKind::kManaged;
  if (managed ? stays_within_hbm(request, placement)
              : host_share(request.size, placement) == Bytes(0)) {
    return;
  }
  const auto end = std::chrono::steady_clock::now() + kLongestWait;
  while (const auto refusal = book(request, placement)) {
    if (!refusal->may_pass || std::chrono::steady_clock::now() >= end) {
      state().ledger.refused_by_reserve(request.device, placement.backing);
      throw ReserveExceeded(refusal->why);
    }
    std::this_thread::sleep_for(kPause);
  }
}

std::optional<HostClaim::Refusal> HostClaim::book(const Request& request,
                                                  const Placement& placement) {
  Books& all = books();
  std::lock_guard<std::mutex> lock(all.mutex);
  const ProcessTable::Turn turn(all.table);
  const Bytes on_host = host_share(request.size, placement);
  if (may_be_of_carveout(placement.backing)) {
    if (const auto carveout = egm_carveout()) return book_of_carveout(on_host, *carveout);
  }
  const bool managed = placement.backing == BackingKind::kManaged;
  const ManagedPromise promise = managed_promise(managed ? &request : nullptr, &placement);
  ReserveQuestion question;
  question.asked = managed ? promise.request : on_host;
  // It stays within HBM.
  if (question.asked == Bytes(0)) return std::nullopt;
  question.promised = promise.segments;
  question.pending = all.own.pending;
  const auto others = all.table.others();
  const auto limits = host_limits(hbm_nodes());
  question.reserve =
      state().config.get().host_reserve.value_or(default_reserve(least_total(limits)));
  for (const MemoryLimit& limit : limits) {
    const Booking elsewhere = sum_within(others, limit.group);
    question.promised_elsewhere = elsewhere.promised;
    question.pending_elsewhere = elsewhere.pending;
    question.host = {limit.total, std::min(limit.available, limit.total), limit.name};
    if (const auto why = over_reserve(question)) {
      return Refusal{*why, question.pending > Bytes(0) || elsewhere.pending > Bytes(0)};
    }
  }
  Booking own = all.own;
  own.promised = promise.segments;
  own.pending = own.pending + question.asked;
  name_groups(own, limits);
  publish(all, own);
  pending_ = question.asked;
  return std::nullopt;
}

std::optional<HostClaim::Refusal> HostClaim::book_of_carveout(Bytes asked, Bytes carveout) {
  Books& all = books();
  Booking own = all.own;
  own.carveout = held_of_carveout() + all.carveout_pending;
  const Bytes elsewhere = sum_within(all.table.others(), 0).carveout;
  const Bytes left = difference_or_zero(difference_or_zero(carveout, own.carveout), elsewhere);
  if (asked > left) {
    return Refusal{"the EGM carve-out of " + describe(carveout) + " leaves no room for " +
                   describe(asked) + ": " + describe(own.carveout) + " are held, and " +
                   describe(elsewhere) +
                   " by other processes. Free tensors, call torch.cuda.empty_cache(), or choose "
                   "another backing."};
  }
  own.carveout = own.carveout + asked;
  publish(all, own);
  all.carveout_pending = all.carveout_pending + asked;
  carveout_ = asked;
  return std::nullopt;
}

HostClaim::~HostClaim() {
  if (pending_ == Bytes(0) && carveout_ == Bytes(0)) return;
  Books& all = books();
  std::lock_guard<std::mutex> lock(all.mutex);
  all.own.pending = all.own.pending - pending_;
  all.carveout_pending = all.carveout_pending - carveout_;
  try_refresh(all);
}

void unbook_released(const Segment& segment) noexcept {
  const BackingKind kind = segment.placement.backing;
  if (kind != BackingKind::kManaged && !may_be_of_carveout(kind)) return;
  Books& all = books();
  std::lock_guard<std::mutex> lock(all.mutex);
  if (all.own.promised > Bytes(0) || all.own.carveout > Bytes(0)) try_refresh(all);
}

Bookings bookings() {
  Books& all = books();
  std::lock_guard<std::mutex> lock(all.mutex);
  Bookings now;
  now.promised = managed_promise().segments;
  const auto others = all.table.others();
  now.others = sum_within(others, 0);
  now.other_processes = others.size();
  now.problem = all.table.problem();
  return now;
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
