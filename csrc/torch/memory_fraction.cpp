// torch.cuda.set_per_process_memory_fraction, kept to the device tier.
#include "torch/memory_fraction.h"

#include <c10/cuda/CUDAGuard.h>

#include <algorithm>

#include "core/state.h"

namespace egm {

void MemoryFraction::set(double fraction) {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    native_->setMemoryFraction(fraction, device_);
    fraction_ = fraction;
    applied_ = fraction;
    unlimited_ = fraction >= 1.0;
  }
  allow_extended(Bytes(0));
}

double MemoryFraction::get() {
  std::lock_guard<std::mutex> lock(mutex_);
  return fraction_ ? *fraction_ : native_->getMemoryFraction(device_);
}

void MemoryFraction::allow_extended(Bytes coming) {
  if (unlimited()) return;
  std::lock_guard<std::mutex> lock(mutex_);
  // torch's own getters and setters leave the device they were asked about current.
  c10::cuda::CUDAGuard current(device_);
  if (!fraction_) {
    // It may come from PYTORCH_CUDA_ALLOC_CONF (per_process_memory_fraction).
    fraction_ = native_->getMemoryFraction(device_);
    applied_ = *fraction_;
  }
  unlimited_ = *fraction_ >= 1.0;
  if (unlimited_) return;
  const Bytes extended = state().ledger.reserved_outside_hbm(device_) + coming;
  if (extended == Bytes(0) && applied_ == *fraction_) return;
  const auto total = static_cast<double>(native_->getMemoryInfo(device_).second);
  const double share = static_cast<double>(extended.count()) / total;
  const double wanted = std::min(1.0, *fraction_ + share);
  if (wanted == applied_) return;
  native_->setMemoryFraction(wanted, device_);
  applied_ = wanted;
}

}  // namespace egm
