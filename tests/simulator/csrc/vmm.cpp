// Virtual memory management: physical memory, reserved addresses and mappings.
#include "vmm.h"

#include <sys/mman.h>

#include <algorithm>
#include <unordered_set>

#include "machine.h"
#include "memory.h"
#include "vmm_books.h"

namespace egm_sim {
namespace {

std::map<CUdeviceptr, size_t>& reservations() {
  static auto* const all = new std::map<CUdeviceptr, size_t>;
  return *all;
}
std::unordered_set<Physical*>& physicals() {
  static auto* const all = new std::unordered_set<Physical*>;
  return *all;
}

void* pointer(CUdeviceptr address) { return reinterpret_cast<void*>(address); }

bool in_hbm(const CUmemAllocationProp& properties) {
  return properties.location.type == CU_MEM_LOCATION_TYPE_DEVICE;
}

Physical* find_physical(CUmemGenericAllocationHandle handle) {
  auto* physical = reinterpret_cast<Physical*>(handle);
  return physicals().count(physical) && physical->handles > 0 ? physical : nullptr;
}

void give_back(const CUmemAllocationProp& properties, size_t size) {
  if (in_hbm(properties)) {
    give_back_hbm(properties.location.id, size);
  } else {
    host_node(properties.location.id)->taken -= size;
  }
}

void drop_if_unused(Physical* physical) {
  if (physical->handles > 0 || physical->mappings > 0) return;
  give_back(physical->properties, physical->size);
  munmap(physical->open, physical->piece.bytes);
  drop_piece(physical->piece);
  physicals().erase(physical);
  delete physical;
}

// A node of HBM is none of the host's.
CUresult take(const CUmemLocation& location, size_t size) {
  switch (location.type) {
    case CU_MEM_LOCATION_TYPE_DEVICE:
      if (!device_exists(location.id)) return CUDA_ERROR_INVALID_DEVICE;
      return take_hbm(location.id, size) ? CUDA_SUCCESS : CUDA_ERROR_OUT_OF_MEMORY;
    case CU_MEM_LOCATION_TYPE_HOST_NUMA: {
      if (!machine().host_numa_vmm) return CUDA_ERROR_NOT_SUPPORTED;
      HostNode* node = host_node(location.id);
      if (!node) return CUDA_ERROR_INVALID_VALUE;
      if (node->taken > node->total || size > node->total - node->taken) {
        return CUDA_ERROR_OUT_OF_MEMORY;
      }
      node->taken += size;
      return CUDA_SUCCESS;
    }
    case CU_MEM_LOCATION_TYPE_HOST:
      return CUDA_ERROR_NOT_SUPPORTED;  // no machine says that it can
    default:
      return CUDA_ERROR_INVALID_VALUE;
  }
}

// The last entry of a map that starts at or before an address, or its end.
template <class Map>
typename Map::iterator before(Map& map, CUdeviceptr at) {
  const auto next = map.upper_bound(at);
  return next == map.begin() ? map.end() : std::prev(next);
}

bool any_mapped(CUdeviceptr ptr, size_t size) {
  const auto next = mappings().lower_bound(ptr);
  return mapping_of(ptr) || (next != mappings().end() && next->first - ptr < size);
}

}  // namespace

Mappings& mappings() {
  static auto* const all = new Mappings;
  return *all;
}

bool is_reserved(CUdeviceptr ptr, size_t size) {
  const auto found = before(reservations(), ptr);
  if (found == reservations().end()) return false;
  const CUdeviceptr end = found->first + found->second;
  return ptr < end && size <= end - ptr;
}

Mapping* mapping_of(CUdeviceptr ptr) {
  const auto found = before(mappings(), ptr);
  if (found == mappings().end() || ptr - found->first >= found->second.size) return nullptr;
  return &found->second;
}

std::pair<Mappings::iterator, Mappings::iterator> whole_mappings(CUdeviceptr ptr, size_t size) {
  const auto first = mappings().lower_bound(ptr);
  auto last = first;
  CUdeviceptr end = ptr;
  while (last != mappings().end() && last->first == end && end - ptr < size) {
    end += last->second.size;
    ++last;
  }
  return {first, end - ptr == size ? last : first};
}

CUresult create_physical(CUmemGenericAllocationHandle* out, size_t size,
                         const CUmemAllocationProp& properties) {
  if (size == 0 || size % kGranularity) return CUDA_ERROR_INVALID_VALUE;
  if (properties.type != CU_MEM_ALLOCATION_TYPE_PINNED) return CUDA_ERROR_INVALID_VALUE;
  if (CUresult error = take(properties.location, size)) return error;
  const Piece piece = take_piece(size);
  void* open = mmap(nullptr, piece.bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE,
                    physical_memory_fd(), static_cast<off_t>(piece.offset));
  if (open == MAP_FAILED) {
    give_back(properties, size);
    return CUDA_ERROR_OUT_OF_MEMORY;
  }
  auto* physical = new Physical{piece, size, properties, static_cast<char*>(open)};
  physicals().insert(physical);
  *out = reinterpret_cast<CUmemGenericAllocationHandle>(physical);
  return CUDA_SUCCESS;
}

CUresult retain_physical(CUmemGenericAllocationHandle* out, const void* mapped) {
  const Mapping* mapping = mapping_of(reinterpret_cast<CUdeviceptr>(mapped));
  if (!mapping) return CUDA_ERROR_INVALID_VALUE;
  ++mapping->physical->handles;
  *out = reinterpret_cast<CUmemGenericAllocationHandle>(mapping->physical);
  return CUDA_SUCCESS;
}

CUresult release_physical(CUmemGenericAllocationHandle handle) {
  Physical* physical = find_physical(handle);
  if (!physical) return CUDA_ERROR_INVALID_VALUE;
  --physical->handles;
  drop_if_unused(physical);
  return CUDA_SUCCESS;
}

const CUmemAllocationProp* properties_of(CUmemGenericAllocationHandle handle) {
  const Physical* physical = find_physical(handle);
  return physical ? &physical->properties : nullptr;
}

// Reserved means: mapped without access, so that a touch faults.
CUresult reserve_addresses(CUdeviceptr* out, size_t size, size_t alignment) {
  if (size == 0 || size % kGranularity) return CUDA_ERROR_INVALID_VALUE;
  alignment = std::max(alignment, kGranularity);
  const size_t room = size + alignment;
  void* got = mmap(nullptr, room, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (got == MAP_FAILED) return CUDA_ERROR_OUT_OF_MEMORY;
  const CUdeviceptr start = reinterpret_cast<CUdeviceptr>(got);
  const CUdeviceptr base = (start + alignment - 1) / alignment * alignment;
  if (base > start) munmap(got, base - start);
  if (start + room > base + size) munmap(pointer(base + size), start + room - base - size);
  reservations()[base] = size;
  *out = base;
  return CUDA_SUCCESS;
}

CUresult free_addresses(CUdeviceptr ptr, size_t size) {
  const auto found = reservations().find(ptr);
  if (found == reservations().end() || found->second != size || any_mapped(ptr, size)) {
    return CUDA_ERROR_INVALID_VALUE;
  }
  munmap(pointer(ptr), size);
  reservations().erase(found);
  return CUDA_SUCCESS;
}

size_t reserved_bytes() {
  size_t bytes = 0;
  for (const auto& [base, size] : reservations()) bytes += size;
  return bytes;
}

CUresult map_physical(CUdeviceptr ptr, size_t size, size_t offset,
                      CUmemGenericAllocationHandle handle) {
  Physical* physical = find_physical(handle);
  // cuda.h at cuMemMap: the offset "currently must be zero".
  if (!physical || offset != 0 || size == 0 || size > physical->size) {
    return CUDA_ERROR_INVALID_VALUE;
  }
  if (ptr % kGranularity || size % kGranularity) return CUDA_ERROR_INVALID_VALUE;
  if (!is_reserved(ptr, size) || any_mapped(ptr, size)) return CUDA_ERROR_INVALID_VALUE;
  void* got = mmap(pointer(ptr), size, PROT_NONE, MAP_SHARED | MAP_FIXED | MAP_NORESERVE,
                   physical_memory_fd(), static_cast<off_t>(physical->piece.offset));
  if (got == MAP_FAILED) return CUDA_ERROR_OUT_OF_MEMORY;
  ++physical->mappings;
  mappings()[ptr] = {ptr, size, physical};
  if (in_hbm(physical->properties)) {
    enter_allocation(Kind::kVmm, ptr, size, physical->properties.location.id);
  } else {
    enter_allocation(Kind::kVmmHost, ptr, size, current_device());
  }
  return CUDA_SUCCESS;
}

// Unmaps whole mappings only, as the driver demands.
CUresult unmap_physical(CUdeviceptr ptr, size_t size) {
  const auto [first, last] = whole_mappings(ptr, size);
  if (first == last) return CUDA_ERROR_INVALID_VALUE;
  mmap(pointer(ptr), size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | MAP_NORESERVE, -1,
       0);
  for (auto each = first; each != last; ++each) {
    forget_allocation(allocation_at(pointer(each->first)));
    --each->second.physical->mappings;
    drop_if_unused(each->second.physical);
  }
  mappings().erase(first, last);
  return CUDA_SUCCESS;
}

}  // namespace egm_sim
