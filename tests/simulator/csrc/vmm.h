// Virtual memory management without CUDA's names: physical memory, reserved addresses, mappings and
// who may use them. Mappings are real: two of one handle alias. Callers hold the lock.
//
// A mapping's page protection is the CPU's access, which only memory of the host can be given. The
// simulator itself, being the devices, uses a second mapping that is always open (open_view).
#pragma once

#include <cuda.h>

#include <cstddef>
#include <string>

namespace egm_sim {

constexpr size_t kGranularity = size_t{2} << 20;

CUresult create_physical(CUmemGenericAllocationHandle* out, size_t size,
                         const CUmemAllocationProp& properties);
CUresult retain_physical(CUmemGenericAllocationHandle* out, const void* mapped);
CUresult release_physical(CUmemGenericAllocationHandle handle);
// nullptr if there is no such handle, or if it was released.
const CUmemAllocationProp* properties_of(CUmemGenericAllocationHandle handle);

CUresult reserve_addresses(CUdeviceptr* out, size_t size, size_t alignment);
CUresult free_addresses(CUdeviceptr ptr, size_t size);
size_t reserved_bytes();

CUresult map_physical(CUdeviceptr ptr, size_t size, size_t offset,
                      CUmemGenericAllocationHandle handle);
CUresult unmap_physical(CUdeviceptr ptr, size_t size);
CUresult set_access(CUdeviceptr ptr, size_t size, const CUmemAccessDesc* access, size_t count);
CUresult get_access(unsigned long long* flags, const CUmemLocation& location, CUdeviceptr ptr);
// A list of texts such as "device:0=read-write", in JSON.
std::string access_json(const CUmemAccessDesc* access, size_t count);

// Whether a device may use every byte of a range. True of memory that nobody reserved addresses
// for; false where a range is reserved but not mapped.
bool device_can_access(const void* address, size_t bytes, int device, bool write);

// Where the simulator reaches the bytes of a range that device_can_access allowed, and how many of
// them follow there.
struct View {
  char* at;
  size_t bytes;
  bool physical;  // a mapping of physical memory
};
View open_view(void* address, size_t bytes);

}  // namespace egm_sim
