// Host memory that a thread brings up ahead of the mapped ranges that will take it. The driver
// takes its time for memory of a host NUMA node, one request after the other whoever asks, so what
// will be needed is best asked for while something else is done.
#pragma once

#include <cuda.h>

#include <memory>
#include <optional>

#include "core/units.h"

namespace egm {

class HostStock {
 public:
  // Begins to bring up `total` bytes, rounded down to pieces of at least `piece`, as far as the
  // reserve allows. Throws CudaError where the driver cannot map memory of a host node.
  HostStock(DeviceIndex device, Bytes total, Bytes piece);
  // Gives back what was not taken. Does not wait: what is still being brought up is given back by
  // the thread that does so.
  ~HostStock();
  HostStock(const HostStock&) = delete;
  HostStock& operator=(const HostStock&) = delete;

  Bytes piece() const;
  Bytes held() const;
  // Returns when so much is held, or no more can be had: whoever needs it will be told why.
  void wait_for(Bytes wanted) const noexcept;
  // Returns when nothing more is being brought up.
  void wait() const noexcept;
  // What is being brought up is the last.
  void stop() noexcept;

  // A piece, which is the caller's from then on.
  std::optional<CUmemGenericAllocationHandle> take() noexcept;
  // The bytes taken since this was last asked, whose booking passes to the caller.
  Bytes pass_booking() noexcept;

  // The stock that this thread's ranges on a device take host memory from, or null.
  static HostStock* of_this_thread(DeviceIndex device);
  // While it lives, this thread's ranges take from a stock, and wait for what they need of it. Ends
  // in the thread in which it began.
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
  struct Shelf;
  const std::shared_ptr<Shelf> shelf_;
};

}  // namespace egm
