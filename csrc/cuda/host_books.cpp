// The books of this process, and the thread that keeps its promise fresh for the others.
#include "cuda/host_books.h"

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <memory>
#include <thread>
#include <vector>

#include "cuda/guards.h"

namespace egm {
namespace {

// How far managed memory is populated changes without a call of ours. While there is a promise, a
// thread tells the others about once a second what is left of it, or less often where that would
// keep a core busy. It calls neither CUDA nor torch, and uses nothing that is destroyed at exit.
void keep_promise_fresh() {
  using Clock = std::chrono::steady_clock;
  constexpr Clock::duration kPause = std::chrono::seconds(1);
  constexpr int kIdleShare = 20;
  Books& all = books();
  Clock::duration pause = kPause;
  while (true) {
    std::this_thread::sleep_for(pause);
    const auto start = Clock::now();
    std::vector<ManagedPromise::Answer> answers;
    {
      std::lock_guard<std::mutex> lock(all.mutex);
      answers = all.promise.questions();
    }
    ManagedPromise::ask(answers);
    pause = std::max(kPause, kIdleShare * (Clock::now() - start));
    std::lock_guard<std::mutex> lock(all.mutex);
    all.promise.apply(answers);
    publish(all);
    all.refreshing = all.own.promised > Bytes(0);
    if (!all.refreshing) return;
  }
}

}  // namespace

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

void publish(Books& all) noexcept {
  try {
    all.own.promised = all.promise.total();
    all.table.publish(all.own);
    if (all.own.promised == Bytes(0) || all.refreshing) return;
    const NoSignalsScope scope;
    std::thread(keep_promise_fresh).detach();
    all.refreshing = true;
  } catch (const std::exception&) {
    // Others see what was when this process last took or gave back memory.
  }
}

void ask_about_promise(Books& all) {
  auto answers = all.promise.questions();
  ManagedPromise::ask(answers);
  all.promise.apply(answers);
}

void see_hbm_without_torch(DeviceIndex device) {
  Books& all = books();
  {
    std::lock_guard<std::mutex> lock(all.mutex);
    if (all.promise.is_told_of_torch(device)) return;
  }
  const auto view = ManagedPromise::look(device);
  std::lock_guard<std::mutex> lock(all.mutex);
  if (view && !all.promise.is_told_of_torch(device)) all.promise.see(*view, std::nullopt);
}

void unbook_node(Bytes released) noexcept {
  if (released == Bytes(0)) return;
  Books& all = books();
  std::lock_guard<std::mutex> lock(all.mutex);
  const Bytes before = all.own.carveout;
  // A forked child has not booked what its parent holds.
  all.own.carveout = difference_or_zero(before, released);
  if (before > Bytes(0)) publish(all);
}

void see_hbm(DeviceIndex device, Bytes of_torch) {
  // Not under the mutex: it asks CUDA.
  const auto view = ManagedPromise::look(device);
  if (!view) return;
  Books& all = books();
  std::lock_guard<std::mutex> lock(all.mutex);
  all.promise.see(*view, of_torch);
}

void unbook_managed(const Segment& segment) noexcept {
  Books& all = books();
  std::lock_guard<std::mutex> lock(all.mutex);
  const bool promised = all.own.promised > Bytes(0);
  all.promise.remove(segment);
  if (promised) publish(all);
}

void rebook_advised(const ManagedRange& range, bool prefers_host) {
  Books& all = books();
  std::lock_guard<std::mutex> lock(all.mutex);
  all.promise.set_prefers_host(range, prefers_host);
  if (all.own.promised > Bytes(0)) publish(all);
}

void rebook_prefetched(const ManagedRange& range, Location to) {
  Books& all = books();
  std::lock_guard<std::mutex> lock(all.mutex);
  all.promise.set_moving(range, to);
  if (all.own.promised > Bytes(0)) publish(all);
}

Bookings bookings() {
  Books& all = books();
  std::lock_guard<std::mutex> lock(all.mutex);
  ask_about_promise(all);
  Bookings now;
  now.promised = all.promise.total();
  const auto others = all.table.others();
  now.others = sum_within(others, 0);
  now.other_processes = others.size();
  now.problem = all.table.problem();
  return now;
}

}  // namespace egm
