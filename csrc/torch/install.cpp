// Putting the allocator in torch's place.
#include "torch/install.h"

#include <c10/core/Allocator.h>
#include <c10/cuda/CUDAFunctions.h>
#include <cuda_runtime_api.h>

#include <limits>
#include <mutex>

#include "cuda/mapped_ranges.h"

namespace egm {
namespace {

// Leaked: tensors of static lifetime are freed after our destructors would have run.
std::atomic<TieredAllocator*> instance{nullptr};

// torch asks its allocator once per pair of devices, and does not say which it asked the former one
// about: those that it uses may have been among them. More access than torch makes use of is no
// harm.
void take_over_peers() {
  const auto count = c10::cuda::device_count();
  for (c10::DeviceIndex reader = 0; reader < count; ++reader) {
    for (c10::DeviceIndex owner = 0; owner < count; ++owner) {
      if (reader == owner || !c10::cuda::hasPrimaryContext(reader) ||
          !c10::cuda::hasPrimaryContext(owner)) {
        continue;
      }
      int can_access = 0;
      if (cudaDeviceCanAccessPeer(&can_access, reader, owner) != cudaSuccess) cudaGetLastError();
      if (can_access != 0) allow_peer(reader, owner);
    }
  }
}

}  // namespace

TieredAllocator* installed() { return instance.load(); }

TieredAllocator& install() {
  static std::mutex mutex;
  std::lock_guard<std::mutex> lock(mutex);
  cca::CUDAAllocator* const current = cca::allocator.load();
  TieredAllocator* const ours = instance.load();
  TORCH_CHECK(ours == nullptr || current == ours,
              "egm_alloc cannot be enabled: torch's allocator was replaced after it was installed "
              "(by torch.cuda.memory.change_current_allocator, for instance).");
  TORCH_CHECK(current != nullptr && current->name() == "native",
              "egm_alloc cannot be enabled over torch's '", current ? current->name() : "missing",
              "' allocator, because it extends the native caching one: unset "
              "backend:cudaMallocAsync in PYTORCH_CUDA_ALLOC_CONF, and do not call "
              "torch.cuda.memory.change_current_allocator.");
  TORCH_CHECK(current->isEnabled(),
              "egm_alloc cannot be enabled while torch's caching is off: call "
              "torch.cuda.caching_allocator_enable(True) first.");
  if (ours != nullptr) return *ours;
  auto* const allocator = new TieredAllocator(current);
  instance.store(allocator);
  // Both: torch.cuda reads the first, torch.accelerator and c10::GetAllocator the second.
  cca::allocator.store(allocator);
  // With the lowest priority that is accepted: torch 2.13 registers its own above the lowest.
  for (int priority = 0; priority <= std::numeric_limits<uint8_t>::max(); ++priority) {
    c10::SetAllocator(c10::DeviceType::CUDA, allocator, static_cast<uint8_t>(priority));
    if (c10::GetAllocator(c10::DeviceType::CUDA) == allocator) break;
  }
  if (current->initialized()) {
    try {
      take_over_peers();
    } catch (const c10::Error&) {
      // In a forked child, where torch says itself that it cannot use CUDA.
    }
  }
  return *allocator;
}

bool is_diverting() {
  const TieredAllocator* const ours = instance.load();
  return ours != nullptr && ours->started() && cca::allocator.load() == ours && ours->isEnabled();
}

void tell_hbm_of_torch() {
  TieredAllocator* const ours = instance.load();
  if (ours != nullptr && ours->initialized()) ours->tell_hbm_of_torch();
}

bool caching_is_enabled() {
  cca::CUDAAllocator* const current = cca::allocator.load();
  return current == nullptr || current->isEnabled();
}

}  // namespace egm
