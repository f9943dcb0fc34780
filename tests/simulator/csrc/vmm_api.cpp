// Virtual memory management: cuMemCreate, cuMemAddressReserve, cuMemMap and what belongs to them.
// Mappings are real: two of one handle alias, and memory without access set faults when touched.
#include <sys/mman.h>

#include <map>

#include "machine.h"
#include "memory.h"

namespace egm_sim {
namespace {

constexpr size_t kGranularity = 2 * kMiB;

struct Physical {
  Piece piece;
  size_t size;
  CUmemAllocationProp properties;
  int references;  // handles held, plus mappings
};
struct Mapping {
  size_t size;
  Physical* physical;
};

std::map<CUdeviceptr, size_t>& reservations() {
  static auto* const all = new std::map<CUdeviceptr, size_t>;
  return *all;
}
std::map<CUdeviceptr, Mapping>& mappings() {
  static auto* const all = new std::map<CUdeviceptr, Mapping>;
  return *all;
}

bool in_hbm(const CUmemAllocationProp& properties) {
  return properties.location.type == CU_MEM_LOCATION_TYPE_DEVICE;
}

void release(Physical* physical) {
  if (--physical->references > 0) return;
  if (in_hbm(physical->properties)) give_back_hbm(physical->properties.location.id, physical->size);
  drop_piece(physical->piece);
  delete physical;
}

CUresult create(CUmemGenericAllocationHandle* out, size_t size,
                const CUmemAllocationProp& properties) {
  if (size == 0 || size % kGranularity) return CUDA_ERROR_INVALID_VALUE;
  const int id = properties.location.id;
  if (in_hbm(properties)) {
    if (!device_exists(id)) return CUDA_ERROR_INVALID_DEVICE;
    if (!take_hbm(id, size)) return CUDA_ERROR_OUT_OF_MEMORY;
  }
  *out = reinterpret_cast<CUmemGenericAllocationHandle>(
      new Physical{take_piece(size), size, properties, 1});
  return CUDA_SUCCESS;
}

// Reserved means: mapped without access, so that a touch faults.
CUresult reserve(CUdeviceptr* out, size_t size, size_t alignment) {
  if (size == 0 || size % kGranularity) return CUDA_ERROR_INVALID_VALUE;
  if (alignment < kGranularity) alignment = kGranularity;
  const size_t room = size + alignment;
  void* got = mmap(nullptr, room, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (got == MAP_FAILED) return CUDA_ERROR_OUT_OF_MEMORY;
  const CUdeviceptr start = reinterpret_cast<CUdeviceptr>(got);
  const CUdeviceptr base = (start + alignment - 1) / alignment * alignment;
  if (base > start) munmap(got, base - start);
  if (start + room > base + size) {
    munmap(reinterpret_cast<void*>(base + size), start + room - base - size);
  }
  reservations()[base] = size;
  *out = base;
  return CUDA_SUCCESS;
}

bool is_reserved(CUdeviceptr ptr, size_t size) {
  auto next = reservations().upper_bound(ptr);
  if (next == reservations().begin()) return false;
  const auto& [base, length] = *std::prev(next);
  return ptr + size <= base + length;
}

bool is_mapped(CUdeviceptr ptr, size_t size) {
  const auto next = mappings().lower_bound(ptr);
  if (next != mappings().end() && next->first < ptr + size) return true;
  if (next == mappings().begin()) return false;
  const auto& [base, mapping] = *std::prev(next);
  return ptr < base + mapping.size;
}

CUresult map(CUdeviceptr ptr, size_t size, size_t offset, Physical* physical) {
  if (!is_reserved(ptr, size) || is_mapped(ptr, size)) return CUDA_ERROR_INVALID_VALUE;
  if (offset + size > physical->size) return CUDA_ERROR_INVALID_VALUE;
  void* got =
      mmap(reinterpret_cast<void*>(ptr), size, PROT_NONE, MAP_SHARED | MAP_FIXED | MAP_NORESERVE,
           physical_memory_fd(), static_cast<off_t>(physical->piece.offset + offset));
  if (got == MAP_FAILED) return CUDA_ERROR_OUT_OF_MEMORY;
  ++physical->references;
  mappings()[ptr] = {size, physical};
  const int device = in_hbm(physical->properties) ? physical->properties.location.id : 0;
  enter_allocation(Kind::kVmm, ptr, size, device);
  return CUDA_SUCCESS;
}

// Unmaps whole mappings only, as the driver demands.
CUresult unmap(CUdeviceptr ptr, size_t size) {
  auto first = mappings().lower_bound(ptr);
  auto last = first;
  CUdeviceptr end = ptr;
  for (; last != mappings().end() && last->first == end && end < ptr + size; ++last) {
    end += last->second.size;
  }
  if (end != ptr + size) return CUDA_ERROR_INVALID_VALUE;
  mmap(reinterpret_cast<void*>(ptr), size, PROT_NONE,
       MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | MAP_NORESERVE, -1, 0);
  for (auto each = first; each != last; ++each) {
    forget_allocation(allocation_at(reinterpret_cast<void*>(each->first)));
    release(each->second.physical);
  }
  mappings().erase(first, last);
  return CUDA_SUCCESS;
}

Physical* physical_at(CUdeviceptr ptr) {
  auto next = mappings().upper_bound(ptr);
  if (next == mappings().begin()) return nullptr;
  const auto& [base, mapping] = *std::prev(next);
  return ptr < base + mapping.size ? mapping.physical : nullptr;
}

Physical* physical_of(CUmemGenericAllocationHandle handle) {
  return reinterpret_cast<Physical*>(handle);
}

}  // namespace
}  // namespace egm_sim

using namespace egm_sim;

extern "C" {

CUresult cuMemGetAllocationGranularity(size_t* out, const CUmemAllocationProp*,
                                       CUmemAllocationGranularity_flags) {
  return api<CUresult>("cuMemGetAllocationGranularity", kPlain, {}, [&](Call&) {
    *out = kGranularity;
    return CUDA_SUCCESS;
  });
}

CUresult cuMemCreate(CUmemGenericAllocationHandle* out, size_t size,
                     const CUmemAllocationProp* properties, unsigned long long) {
  return api<CUresult>("cuMemCreate", kPlain,
                       {{"size", size},
                        {"location_type", properties->location.type},
                        {"location_id", properties->location.id}},
                       [&](Call& call) {
                         const CUresult result = create(out, size, *properties);
                         if (result == CUDA_SUCCESS) call.note({"handle", *out});
                         return result;
                       });
}

CUresult cuMemRelease(CUmemGenericAllocationHandle handle) {
  return api<CUresult>("cuMemRelease", kPlain, {{"handle", handle}}, [&](Call&) {
    release(physical_of(handle));
    return CUDA_SUCCESS;
  });
}

CUresult cuMemAddressReserve(CUdeviceptr* out, size_t size, size_t alignment, CUdeviceptr,
                             unsigned long long) {
  return api<CUresult>("cuMemAddressReserve", kPlain, {{"size", size}, {"alignment", alignment}},
                       [&](Call& call) {
                         const CUresult result = reserve(out, size, alignment);
                         if (result == CUDA_SUCCESS) call.note({"ptr", *out});
                         return result;
                       });
}

CUresult cuMemAddressFree(CUdeviceptr ptr, size_t size) {
  return api<CUresult>("cuMemAddressFree", kPlain, {{"ptr", ptr}, {"size", size}}, [&](Call&) {
    const auto found = reservations().find(ptr);
    if (found == reservations().end() || found->second != size || is_mapped(ptr, size)) {
      return CUDA_ERROR_INVALID_VALUE;
    }
    munmap(reinterpret_cast<void*>(ptr), size);
    reservations().erase(found);
    return CUDA_SUCCESS;
  });
}

CUresult cuMemMap(CUdeviceptr ptr, size_t size, size_t offset, CUmemGenericAllocationHandle handle,
                  unsigned long long) {
  return api<CUresult>("cuMemMap", kPlain, {{"ptr", ptr}, {"size", size}, {"handle", handle}},
                       [&](Call&) { return map(ptr, size, offset, physical_of(handle)); });
}

CUresult cuMemUnmap(CUdeviceptr ptr, size_t size) {
  return api<CUresult>("cuMemUnmap", kPlain, {{"ptr", ptr}, {"size", size}},
                       [&](Call&) { return unmap(ptr, size); });
}

CUresult cuMemSetAccess(CUdeviceptr ptr, size_t size, const CUmemAccessDesc* access, size_t count) {
  return api<CUresult>("cuMemSetAccess", kPlain, {{"ptr", ptr}, {"size", size}}, [&](Call&) {
    if (!is_mapped(ptr, size) || count == 0) return CUDA_ERROR_INVALID_VALUE;
    int protection = PROT_NONE;
    if (access->flags == CU_MEM_ACCESS_FLAGS_PROT_READ) protection = PROT_READ;
    if (access->flags == CU_MEM_ACCESS_FLAGS_PROT_READWRITE) protection = PROT_READ | PROT_WRITE;
    const int failed = mprotect(reinterpret_cast<void*>(ptr), size, protection);
    return failed ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS;
  });
}

CUresult cuMemRetainAllocationHandle(CUmemGenericAllocationHandle* out, void* ptr) {
  return api<CUresult>("cuMemRetainAllocationHandle", kPlain, {{"ptr", ptr}}, [&](Call&) {
    Physical* physical = physical_at(reinterpret_cast<CUdeviceptr>(ptr));
    if (!physical) return CUDA_ERROR_INVALID_VALUE;
    ++physical->references;
    *out = reinterpret_cast<CUmemGenericAllocationHandle>(physical);
    return CUDA_SUCCESS;
  });
}

CUresult cuMemGetAllocationPropertiesFromHandle(CUmemAllocationProp* out,
                                                CUmemGenericAllocationHandle handle) {
  return api<CUresult>("cuMemGetAllocationPropertiesFromHandle", kPlain, {{"handle", handle}},
                       [&](Call&) {
                         *out = physical_of(handle)->properties;
                         return CUDA_SUCCESS;
                       });
}

CUresult cuMemExportToShareableHandle(void*, CUmemGenericAllocationHandle handle,
                                      CUmemAllocationHandleType, unsigned long long) {
  return api<CUresult>("cuMemExportToShareableHandle", kPlain, {{"handle", handle}},
                       [](Call&) { return CUDA_ERROR_NOT_SUPPORTED; });
}

CUresult cuMemImportFromShareableHandle(CUmemGenericAllocationHandle*, void*,
                                        CUmemAllocationHandleType) {
  return api<CUresult>("cuMemImportFromShareableHandle", kPlain, {},
                       [](Call&) { return CUDA_ERROR_NOT_SUPPORTED; });
}

}  // extern "C"
