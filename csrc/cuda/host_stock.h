// Host memory that a thread brings up ahead of the mapped ranges that will take it. The driver
// takes its time for memory of a host NUMA node, one request after the other whoever asks, so what
// will be needed is best asked for while something else is done (docs/memory-kinds.md).
#pragma once

#include <cuda.h>

#include <atomic>
#include <deque>
#include <mutex>
#include <optional>
#include <thread>

#include "core/units.h"

namespace egm {

class HostStock {
 public:
  // Begins to bring up `total` bytes, rounded down to pieces of at least `piece`, as far as the
  // reserve allows. Throws CudaError where the driver cannot map memory of a host node.
  HostStock(DeviceIndex device, Bytes total, Bytes piece);
  // Stops, and gives back what was not taken.
  ~HostStock();
  HostStock(const HostStock&) = delete;
  HostStock& operator=(const HostStock&) = delete;

  Bytes piece() const { return piece_; }
  Bytes held() const;
  // Returns when all of it is up, or no more can be had: whoever needs that will be told why.
  void wait() noexcept;
  // A piece, which is the caller's from then on.
  std::optional<CUmemGenericAllocationHandle> take() noexcept;

  // The stock that this thread's ranges on a device take host memory from, or null.
  static HostStock* of_this_thread(DeviceIndex device);
  // While it lives, this thread's ranges take from a stock, which is waited for.
  class Scope {
   public:
    explicit Scope(HostStock& stock);
    ~Scope();
    Scope(const Scope&) = delete;
    Scope& operator=(const Scope&) = delete;

   private:
    HostStock* const outer_;
  };

 private:
  void fill() noexcept;
  void unbook(Bytes size) const noexcept;

  const DeviceIndex device_;
  const int host_node_;
  const Bytes piece_;
  const size_t pieces_;
  std::atomic<bool> stopped_{false};
  mutable std::mutex mutex_;
  std::deque<CUmemGenericAllocationHandle> handles_;
  std::thread thread_;
};

}  // namespace egm
