// Bringing up host memory in a thread.
#include "cuda/host_stock.h"

#include <cuda_runtime_api.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <deque>
#include <exception>
#include <mutex>
#include <thread>
#include <utility>

#include "cuda/driver.h"
#include "cuda/errors.h"
#include "cuda/guards.h"
#include "cuda/host_books.h"
#include "cuda/host_reserve.h"
#include "cuda/physical.h"

namespace egm {
namespace {

// So much is asked of the reserve at a time; arbitrary.
constexpr Bytes kBatch = gib(1);

thread_local HostStock* current = nullptr;

}  // namespace

// Shared with the thread, which may outlive the stock by the batch that it is at.
struct HostStock::Shelf {
  Shelf(DeviceIndex device, Bytes total, Bytes least_piece)
      : device(device),
        host_node(host_node_of(device)),
        piece(round_up(std::max(least_piece, Bytes(1)), granularity_of(device, host_node))),
        pieces(static_cast<size_t>(total.count() / piece.count())) {}

  // A forked child has neither the thread nor the memory, and the mutex may be locked for good.
  bool is_of_parent() const { return process != getpid(); }
  void fill() noexcept;
  void put_batch(size_t count);

  const DeviceIndex device;
  const int host_node;
  const Bytes piece;
  const size_t pieces;
  const pid_t process = getpid();
  std::atomic<bool> stopped{false};
  // Leaf lock.
  std::mutex mutex;
  std::condition_variable changed;
  bool filled = false;
  bool given_up = false;
  std::deque<Physical> held;
  Bytes unpassed;
};

void HostStock::Shelf::put_batch(size_t count) {
  const Bytes size(count * piece.count());
  HostClaim claim(Request{size, device}, on_host_node(), &stopped);
  std::deque<Physical> fresh;
  DriverPauses pauses;
  while (fresh.size() < count && !stopped) {
    fresh.emplace_back(piece, Site{device, false, host_node});
    pauses.after(piece);
  }
  std::unique_lock<std::mutex> lock(mutex);
  if (given_up || fresh.size() < count) return;
  for (Physical& physical : fresh) held.emplace_back(physical.leave());
  lock.unlock();
  claim.settle(size);
  changed.notify_all();
}

void HostStock::Shelf::fill() noexcept {
  try {
    check(cudaSetDevice(device), "cudaSetDevice", piece, device);
    const RelaxedCaptureScope relaxed;
    const size_t batch = std::max<size_t>(1, kBatch.count() / piece.count());
    for (size_t done = 0; done < pieces && !stopped; done += batch) {
      put_batch(std::min(batch, pieces - done));
    }
  } catch (const std::exception&) {
    // It ends here; who needs more asks for it, and is told why it cannot be had.
  }
  std::lock_guard<std::mutex> lock(mutex);
  filled = true;
  changed.notify_all();
}

HostStock::HostStock(DeviceIndex device, Bytes total, Bytes piece)
    : shelf_(std::make_shared<Shelf>(device, total, piece)) {
  const NoSignalsScope scope;
  std::thread([shelf = shelf_] { shelf->fill(); }).detach();
}

HostStock::~HostStock() {
  if (shelf_->is_of_parent()) return;
  std::deque<Physical> left;
  Bytes booked;
  {
    std::lock_guard<std::mutex> lock(shelf_->mutex);
    shelf_->stopped = shelf_->given_up = true;
    left.swap(shelf_->held);
    booked = std::exchange(shelf_->unpassed, Bytes(0));
  }
  booked = booked + Bytes(left.size() * shelf_->piece.count());
  left.clear();
  unbook_node(booked);
}

Bytes HostStock::piece() const { return shelf_->piece; }

Bytes HostStock::held() const {
  if (shelf_->is_of_parent()) return Bytes(0);
  std::lock_guard<std::mutex> lock(shelf_->mutex);
  return Bytes(shelf_->held.size() * shelf_->piece.count());
}

void HostStock::stop() noexcept { shelf_->stopped = true; }

void HostStock::wait_for(Bytes wanted) const noexcept {
  const size_t enough = round_up(wanted, shelf_->piece).count() / shelf_->piece.count();
  std::unique_lock<std::mutex> lock(shelf_->mutex);
  shelf_->changed.wait(lock, [&] { return shelf_->filled || shelf_->held.size() >= enough; });
}

void HostStock::wait() const noexcept {
  if (shelf_->is_of_parent()) return;
  std::unique_lock<std::mutex> lock(shelf_->mutex);
  shelf_->changed.wait(lock, [this] { return shelf_->filled; });
}

std::optional<CUmemGenericAllocationHandle> HostStock::take() noexcept {
  std::lock_guard<std::mutex> lock(shelf_->mutex);
  if (shelf_->held.empty()) return std::nullopt;
  const auto handle = shelf_->held.front().leave();
  shelf_->held.pop_front();
  shelf_->unpassed = shelf_->unpassed + shelf_->piece;
  return handle;
}

Bytes HostStock::pass_booking() noexcept {
  std::lock_guard<std::mutex> lock(shelf_->mutex);
  return std::exchange(shelf_->unpassed, Bytes(0));
}

HostStock* HostStock::of_this_thread(DeviceIndex device) {
  if (current == nullptr || current->shelf_->is_of_parent()) return nullptr;
  return current->shelf_->device == device ? current : nullptr;
}

HostStock::Scope::Scope(HostStock& stock) : outer_(current) { current = &stock; }

HostStock::Scope::~Scope() { current = outer_; }

}  // namespace egm
