// CUDA functions of virtual memory management: cuMemCreate, cuMemAddressReserve, cuMemMap and what
// belongs to them.
#include "machine.h"
#include "streams.h"
#include "vmm.h"

using namespace egm_sim;

extern "C" {

CUresult cuMemGetAllocationGranularity(size_t* out, const CUmemAllocationProp* properties,
                                       CUmemAllocationGranularity_flags) {
  const std::string location = location_text(properties->location.type, properties->location.id);
  return api<CUresult>("cuMemGetAllocationGranularity", kPlain,
                       {Arg::of_text("location", location.c_str())}, [&](Call&) {
                         *out = kGranularity;
                         return CUDA_SUCCESS;
                       });
}

CUresult cuMemCreate(CUmemGenericAllocationHandle* out, size_t size,
                     const CUmemAllocationProp* properties, unsigned long long flags) {
  const std::string location = location_text(properties->location.type, properties->location.id);
  return api<CUresult>("cuMemCreate", kPlain,
                       {{"size", size}, Arg::of_text("location", location.c_str())},
                       [&](Call& call) {
                         if (flags != 0) return CUDA_ERROR_INVALID_VALUE;
                         const CUresult result = create_physical(out, size, *properties);
                         if (result == CUDA_SUCCESS) call.note({"handle", *out});
                         return result;
                       });
}

CUresult cuMemRelease(CUmemGenericAllocationHandle handle) {
  return api<CUresult>("cuMemRelease", kPlain, {{"handle", handle}},
                       [&](Call&) { return release_physical(handle); });
}

CUresult cuMemAddressReserve(CUdeviceptr* out, size_t size, size_t alignment, CUdeviceptr,
                             unsigned long long) {
  return api<CUresult>("cuMemAddressReserve", kPlain, {{"size", size}, {"alignment", alignment}},
                       [&](Call& call) {
                         const CUresult result = reserve_addresses(out, size, alignment);
                         if (result == CUDA_SUCCESS) call.note({"ptr", *out});
                         return result;
                       });
}

CUresult cuMemAddressFree(CUdeviceptr ptr, size_t size) {
  return api<CUresult>("cuMemAddressFree", kPlain, {{"ptr", ptr}, {"size", size}},
                       [&](Call&) { return free_addresses(ptr, size); });
}

CUresult cuMemMap(CUdeviceptr ptr, size_t size, size_t offset, CUmemGenericAllocationHandle handle,
                  unsigned long long flags) {
  return api<CUresult>("cuMemMap", kPlain,
                       {{"ptr", ptr}, {"size", size}, {"offset", offset}, {"handle", handle}},
                       [&](Call&) {
                         if (flags != 0) return CUDA_ERROR_INVALID_VALUE;
                         return map_physical(ptr, size, offset, handle);
                       });
}

CUresult cuMemUnmap(CUdeviceptr ptr, size_t size) {
  return api<CUresult>("cuMemUnmap", kPlain, {{"ptr", ptr}, {"size", size}}, [&](Call&) {
    const CUresult result = unmap_physical(ptr, size);
    if (result == CUDA_SUCCESS) note_unmapping();
    return result;
  });
}

CUresult cuMemSetAccess(CUdeviceptr ptr, size_t size, const CUmemAccessDesc* access, size_t count) {
  const std::string texts = access_json(access, count);
  return api<CUresult>("cuMemSetAccess", kPlain,
                       {{"ptr", ptr}, {"size", size}, Arg::of_json("access", texts.c_str())},
                       [&](Call&) { return set_access(ptr, size, access, count); });
}

CUresult cuMemGetAccess(unsigned long long* flags, const CUmemLocation* location, CUdeviceptr ptr) {
  const std::string text = location_text(location->type, location->id);
  return api<CUresult>("cuMemGetAccess", kPlain,
                       {{"ptr", ptr}, Arg::of_text("location", text.c_str())},
                       [&](Call&) { return get_access(flags, *location, ptr); });
}

CUresult cuMemRetainAllocationHandle(CUmemGenericAllocationHandle* out, void* ptr) {
  return api<CUresult>("cuMemRetainAllocationHandle", kPlain, {{"ptr", ptr}},
                       [&](Call&) { return retain_physical(out, ptr); });
}

CUresult cuMemGetAllocationPropertiesFromHandle(CUmemAllocationProp* out,
                                                CUmemGenericAllocationHandle handle) {
  return api<CUresult>("cuMemGetAllocationPropertiesFromHandle", kPlain, {{"handle", handle}},
                       [&](Call&) {
                         const CUmemAllocationProp* properties = properties_of(handle);
                         if (!properties) return CUDA_ERROR_INVALID_VALUE;
                         *out = *properties;
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
