// Bringing up host memory in a thread.
#include "cuda/host_stock.h"

#include <cuda_runtime_api.h>

#include <algorithm>
#include <exception>

#include "cuda/driver.h"
#include "cuda/errors.h"
#include "cuda/guards.h"
#include "cuda/host_reserve.h"
#include "cuda/physical.h"

namespace egm {
namespace {

// So much is asked of the reserve at a time; arbitrary.
constexpr Bytes kBatch = gib(1);

thread_local HostStock* current = nullptr;

Placement on_host_node() {
  Placement placement;
  placement.backing = BackingKind::kNuma;
  return placement;
}

}  // namespace

HostStock::HostStock(DeviceIndex device, Bytes total, Bytes piece)
    : device_(device),
      host_node_(host_node_of(device)),
      piece_(round_up(
          std::max(piece, Bytes(1)),
          std::max(granularity_of({device, true}), granularity_of({device, false, host_node_})))),
      pieces_(static_cast<size_t>(total.count() / piece_.count())) {
  const NoSignalsScope scope;
  thread_ = std::thread([this] { fill(); });
}

HostStock::~HostStock() {
  stopped_ = true;
  wait();
  for (const auto handle : handles_) driver().release(handle);
  unbook(Bytes(handles_.size() * piece_.count()));
}

void HostStock::wait() noexcept {
  if (thread_.joinable()) thread_.join();
}

Bytes HostStock::held() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return Bytes(handles_.size() * piece_.count());
}

void HostStock::fill() noexcept {
  try {
    check(cudaSetDevice(device_), "cudaSetDevice", piece_, device_);
    const RelaxedCaptureScope relaxed;
    const size_t batch = std::max<size_t>(1, kBatch.count() / piece_.count());
    for (size_t done = 0; done < pieces_ && !stopped_;) {
      const size_t wanted = std::min(batch, pieces_ - done);
      const Bytes size(wanted * piece_.count());
      HostClaim claim(Request{size, device_}, on_host_node());
      std::deque<Physical> fresh;
      while (fresh.size() < wanted && !stopped_) {
        fresh.emplace_back(piece_, Site{device_, false, host_node_});
      }
      if (fresh.size() < wanted) return;
      Segment booked;
      booked.size = size;
      booked.device = device_;
      booked.placement = on_host_node();
      claim.settle(booked);
      done += wanted;
      std::lock_guard<std::mutex> lock(mutex_);
      for (Physical& physical : fresh) handles_.push_back(physical.leave());
    }
  } catch (const std::exception&) {
    // It ends here; who needs more asks for it, and is told why it cannot be had.
  }
}

std::optional<CUmemGenericAllocationHandle> HostStock::take() noexcept {
  CUmemGenericAllocationHandle handle = 0;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (handles_.empty()) return std::nullopt;
    handle = handles_.front();
    handles_.pop_front();
  }
  unbook(piece_);
  return handle;
}

// What is taken is booked by the segment that takes it.
void HostStock::unbook(Bytes size) const noexcept {
  Segment booked;
  booked.size = size;
  booked.device = device_;
  booked.placement = on_host_node();
  unbook_released(booked);
}

HostStock* HostStock::of_this_thread(DeviceIndex device) {
  return current != nullptr && current->device_ == device ? current : nullptr;
}

HostStock::Scope::Scope(HostStock& stock) : outer_(current) {
  stock.wait();
  current = &stock;
}

HostStock::Scope::~Scope() { current = outer_; }

}  // namespace egm
