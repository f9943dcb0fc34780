// Putting the allocator in torch's place.
#pragma once

#include "torch/tiered_allocator.h"

namespace egm {

// Null until installed.
TieredAllocator* installed();

// Wraps torch's allocator, once per process. Makes no CUDA call unless torch has brought CUDA up:
// it must work before that and before a fork. Throws c10::Error in one sentence over anything that
// is not torch's caching allocator, or when its caching is off.
TieredAllocator& install();

// Installed, switched on, and still the allocator that torch asks, with its caching on.
bool is_diverting();

// TieredAllocator::tell_hbm_of_torch, where there is anything to tell.
void tell_hbm_of_torch();

// False after torch.cuda.caching_allocator_enable(False): torch then keeps no pools, ours included.
bool caching_is_enabled();

}  // namespace egm
