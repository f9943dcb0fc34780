// CUDA functions that allocate and free memory of devices, and those that describe any memory.
#include "machine.h"
#include "managed.h"
#include "memory.h"
#include "streams.h"

namespace egm_sim {
namespace {

constexpr size_t kGranule = 512;

size_t charged(size_t size) { return (size + kGranule - 1) / kGranule * kGranule; }

cudaError_t allocate_device(void** out, size_t size, Call& call) {
  *out = nullptr;
  if (size == 0) return cudaSuccess;
  const int device = current_device();
  if (!take_hbm(device, charged(size))) return cudaErrorMemoryAllocation;
  Allocation* allocation = map_allocation(Kind::kDevice, size, device);
  if (!allocation) {
    give_back_hbm(device, charged(size));
    return cudaErrorMemoryAllocation;
  }
  *out = reinterpret_cast<void*>(allocation->base);
  call.note({"ptr", *out});
  return cudaSuccess;
}

cudaError_t free_device(void* ptr) {
  if (!ptr) return cudaSuccess;
  Allocation* allocation = allocation_at(ptr);
  if (!allocation) return cudaErrorInvalidValue;
  switch (allocation->kind) {
    case Kind::kDevice:
    case Kind::kAsync:
      complete_device(allocation->device);
      give_back_hbm(allocation->device, charged(allocation->size));
      break;
    case Kind::kManaged:
      for (int device = 0; device < machine().devices; ++device) complete_device(device);
      discard({allocation, 0, allocation->pages->chunks.size()});
      break;
    default:
      return cudaErrorInvalidValue;
  }
  unmap_allocation(allocation);
  return cudaSuccess;
}

cudaMemoryType type_of(const Allocation& allocation) {
  switch (allocation.kind) {
    case Kind::kManaged:
      return cudaMemoryTypeManaged;
    case Kind::kHost:
    case Kind::kRegistered:
    case Kind::kVmmHost:
      return cudaMemoryTypeHost;
    default:
      return cudaMemoryTypeDevice;
  }
}

void describe(cudaPointerAttributes& out, const void* ptr) {
  out = {};
  const Allocation* allocation = allocation_of(ptr);
  void* address = const_cast<void*>(ptr);
  if (!allocation) {
    out.type = cudaMemoryTypeUnregistered;
    out.device = cudaInvalidDeviceId;
    out.hostPointer = address;
    out.devicePointer = machine().preset->coherent ? address : nullptr;
    return;
  }
  out.type = type_of(*allocation);
  out.device = allocation->device;
  out.devicePointer = seen_by_devices(*allocation, ptr);
  if (out.type != cudaMemoryTypeDevice) out.hostPointer = address;
}

CUresult pointer_attribute(void* data, CUpointer_attribute which, const void* ptr) {
  const Allocation* allocation = allocation_of(ptr);
  if (!allocation) return CUDA_ERROR_INVALID_VALUE;
  const cudaMemoryType type = type_of(*allocation);
  switch (which) {
    case CU_POINTER_ATTRIBUTE_CONTEXT:
      *static_cast<uintptr_t*>(data) = static_cast<uintptr_t>(1 + allocation->device);
      return CUDA_SUCCESS;
    case CU_POINTER_ATTRIBUTE_MEMORY_TYPE:
      *static_cast<unsigned*>(data) =
          type == cudaMemoryTypeHost ? CU_MEMORYTYPE_HOST : CU_MEMORYTYPE_DEVICE;
      return CUDA_SUCCESS;
    case CU_POINTER_ATTRIBUTE_DEVICE_POINTER:
      *static_cast<void**>(data) = seen_by_devices(*allocation, ptr);
      return CUDA_SUCCESS;
    case CU_POINTER_ATTRIBUTE_HOST_POINTER:
      if (type == cudaMemoryTypeDevice) return CUDA_ERROR_INVALID_VALUE;
      *static_cast<const void**>(data) = ptr;
      return CUDA_SUCCESS;
    case CU_POINTER_ATTRIBUTE_BUFFER_ID:
      *static_cast<unsigned long long*>(data) = allocation->id;
      return CUDA_SUCCESS;
    case CU_POINTER_ATTRIBUTE_IS_MANAGED:
      *static_cast<bool*>(data) = type == cudaMemoryTypeManaged;
      return CUDA_SUCCESS;
    case CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL:
      *static_cast<int*>(data) = allocation->device;
      return CUDA_SUCCESS;
    case CU_POINTER_ATTRIBUTE_IS_LEGACY_CUDA_IPC_CAPABLE:
      *static_cast<bool*>(data) = allocation->kind == Kind::kDevice;
      return CUDA_SUCCESS;
    case CU_POINTER_ATTRIBUTE_RANGE_START_ADDR:
      *static_cast<uintptr_t*>(data) = allocation->base;
      return CUDA_SUCCESS;
    case CU_POINTER_ATTRIBUTE_RANGE_SIZE:
      *static_cast<size_t*>(data) = allocation->size;
      return CUDA_SUCCESS;
    case CU_POINTER_ATTRIBUTE_MAPPED:
      *static_cast<bool*>(data) = true;
      return CUDA_SUCCESS;
    case CU_POINTER_ATTRIBUTE_SYNC_MEMOPS:
      *static_cast<bool*>(data) = false;
      return CUDA_SUCCESS;
    default:
      return CUDA_ERROR_NOT_SUPPORTED;
  }
}

}  // namespace
}  // namespace egm_sim

using namespace egm_sim;

extern "C" {

cudaError_t cudaMalloc(void** out, size_t size) {
  return api("cudaMalloc", kUnsafeInCapture, {{"size", size}},
             [&](Call& call) { return allocate_device(out, size, call); });
}

cudaError_t cudaFree(void* ptr) {
  return api("cudaFree", kUnsafeInCapture, {{"ptr", ptr}}, [&](Call&) { return free_device(ptr); });
}

cudaError_t cudaMemGetInfo(size_t* free, size_t* total) {
  return api("cudaMemGetInfo", kPlain, {}, [&](Call&) {
    const Hbm& h = hbm(current_device());
    const size_t used = h.taken + h.resident;
    *free = used < h.capacity ? h.capacity - used : 0;
    *total = h.capacity;
    return cudaSuccess;
  });
}

cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* attributes, const void* ptr) {
  return api("cudaPointerGetAttributes", kPlain, {{"ptr", ptr}}, [&](Call&) {
    describe(*attributes, ptr);
    return cudaSuccess;
  });
}

CUresult cuPointerGetAttribute(void* data, CUpointer_attribute which, CUdeviceptr ptr) {
  return api<CUresult>(
      "cuPointerGetAttribute", kPlain, {{"ptr", ptr}, {"attribute", which}},
      [&](Call&) { return pointer_attribute(data, which, reinterpret_cast<void*>(ptr)); });
}

// Unlike the single form, this one answers zeroes for what it does not know.
CUresult cuPointerGetAttributes(unsigned count, CUpointer_attribute* which, void** data,
                                CUdeviceptr ptr) {
  return api<CUresult>("cuPointerGetAttributes", kPlain, {{"ptr", ptr}, {"count", count}},
                       [&](Call&) {
                         for (unsigned i = 0; i < count; ++i) {
                           pointer_attribute(data[i], which[i], reinterpret_cast<void*>(ptr));
                         }
                         return CUDA_SUCCESS;
                       });
}

CUresult cuMemGetAddressRange(CUdeviceptr* base, size_t* size, CUdeviceptr ptr) {
  return api<CUresult>("cuMemGetAddressRange", kPlain, {{"ptr", ptr}}, [&](Call&) {
    const Allocation* allocation = allocation_of(reinterpret_cast<void*>(ptr));
    if (!allocation) return CUDA_ERROR_NOT_FOUND;
    if (base) *base = allocation->base;
    if (size) *size = allocation->size;
    return CUDA_SUCCESS;
  });
}

}  // extern "C"
