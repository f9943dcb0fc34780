// Virtual memory management: who may use a mapping.
#include <sys/mman.h>

#include <algorithm>

#include "machine.h"
#include "vmm.h"
#include "vmm_books.h"

namespace egm_sim {
namespace {

uint64_t bit_of(const CUmemLocation& location) {
  return location.type == CU_MEM_LOCATION_TYPE_DEVICE ? uint64_t{1} << location.id : kCpu;
}

CUresult check_access(const Mapping& mapping, const CUmemAccessDesc& wanted) {
  const CUmemLocation& home = mapping.physical->properties.location;
  switch (wanted.location.type) {
    case CU_MEM_LOCATION_TYPE_DEVICE: {
      const int device = wanted.location.id;
      if (!device_exists(device)) return CUDA_ERROR_INVALID_DEVICE;
      const bool foreign = home.type == CU_MEM_LOCATION_TYPE_DEVICE && home.id != device;
      return foreign && !machine().peer_access ? CUDA_ERROR_INVALID_DEVICE : CUDA_SUCCESS;
    }
    case CU_MEM_LOCATION_TYPE_HOST:
    case CU_MEM_LOCATION_TYPE_HOST_NUMA:
      // cuda.h at cuMemSetAccess: not for allocations created with other location types.
      return home.type == CU_MEM_LOCATION_TYPE_HOST_NUMA ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
    default:
      return CUDA_ERROR_INVALID_VALUE;
  }
}

void allow(Mapping& mapping, const CUmemAccessDesc& wanted) {
  const uint64_t bit = bit_of(wanted.location);
  const bool write = wanted.flags == CU_MEM_ACCESS_FLAGS_PROT_READWRITE;
  const bool read = write || wanted.flags == CU_MEM_ACCESS_FLAGS_PROT_READ;
  mapping.readers = read ? mapping.readers | bit : mapping.readers & ~bit;
  mapping.writers = write ? mapping.writers | bit : mapping.writers & ~bit;
}

}  // namespace

CUresult set_access(CUdeviceptr ptr, size_t size, const CUmemAccessDesc* access, size_t count) {
  const auto [first, last] = whole_mappings(ptr, size);
  if (first == last || !access || count == 0) return CUDA_ERROR_INVALID_VALUE;
  for (auto each = first; each != last; ++each) {
    for (size_t i = 0; i < count; ++i) {
      if (CUresult error = check_access(each->second, access[i])) return error;
    }
  }
  for (auto each = first; each != last; ++each) {
    Mapping& mapping = each->second;
    for (size_t i = 0; i < count; ++i) allow(mapping, access[i]);
    int protection = mapping.readers & kCpu ? PROT_READ : PROT_NONE;
    if (mapping.writers & kCpu) protection |= PROT_WRITE;
    if (mprotect(reinterpret_cast<void*>(mapping.base), mapping.size, protection))
      return CUDA_ERROR_INVALID_VALUE;
  }
  return CUDA_SUCCESS;
}

CUresult get_access(unsigned long long* flags, const CUmemLocation& location, CUdeviceptr ptr) {
  const Mapping* mapping = mapping_of(ptr);
  if (!mapping) return CUDA_ERROR_INVALID_VALUE;
  if (location.type == CU_MEM_LOCATION_TYPE_DEVICE && !device_exists(location.id)) {
    return CUDA_ERROR_INVALID_DEVICE;
  }
  const uint64_t bit = bit_of(location);
  *flags = mapping->writers & bit   ? CU_MEM_ACCESS_FLAGS_PROT_READWRITE
           : mapping->readers & bit ? CU_MEM_ACCESS_FLAGS_PROT_READ
                                    : CU_MEM_ACCESS_FLAGS_PROT_NONE;
  return CUDA_SUCCESS;
}

std::string access_json(const CUmemAccessDesc* access, size_t count) {
  std::string out = "[";
  for (size_t i = 0; access && i < count; ++i) {
    const char* flags = access[i].flags == CU_MEM_ACCESS_FLAGS_PROT_READWRITE ? "read-write"
                        : access[i].flags == CU_MEM_ACCESS_FLAGS_PROT_READ    ? "read"
                                                                              : "none";
    const CUmemLocation& where = access[i].location;
    out +=
        std::string(i ? ", \"" : "\"") + location_text(where.type, where.id) + "=" + flags + "\"";
  }
  return out + "]";
}

bool device_can_access(const void* address, size_t bytes, int device, bool write) {
  CUdeviceptr at = reinterpret_cast<CUdeviceptr>(address);
  if (bytes == 0 || !is_reserved(at, 1)) return true;
  const CUdeviceptr end = at + bytes;
  while (at < end) {
    const Mapping* mapping = mapping_of(at);
    if (!mapping) return false;
    if (!((write ? mapping->writers : mapping->readers) >> device & 1)) return false;
    at = mapping->base + mapping->size;
  }
  return true;
}

View open_view(void* address, size_t bytes) {
  const CUdeviceptr at = reinterpret_cast<CUdeviceptr>(address);
  const Mapping* mapping = mapping_of(at);
  if (!mapping) return {static_cast<char*>(address), bytes, false};
  const size_t offset = at - mapping->base;
  return {mapping->physical->open + offset, std::min(bytes, mapping->size - offset), true};
}

}  // namespace egm_sim
