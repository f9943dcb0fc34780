// The driver's side: entry points by name, devices, contexts, errors. Another file defines the
// memory functions of the driver (vmm_api.cpp, copies_api.cpp, memory_api.cpp).
#include <dlfcn.h>

#include <cstdio>
#include <cstring>

#include "machine.h"
#include "memory.h"

namespace egm_sim {
namespace {

// Our own handle: the object stands in for libcuda.so.1, and its cu* functions are all it has.
void* own_library() {
  static void* const handle = [] {
    Dl_info info{};
    dladdr(reinterpret_cast<void*>(&own_library), &info);
    return dlopen(info.dli_fname, RTLD_LAZY | RTLD_NOLOAD);
  }();
  return handle;
}

// Headers rename functions that had a predecessor (cuMemGetInfo is cuMemGetInfo_v2).
void* entry_point(const char* symbol) {
  if (std::strncmp(symbol, "cu", 2) != 0 || std::strncmp(symbol, "cuda", 4) == 0) return nullptr;
  for (const char* suffix : {"_v3", "_v2", ""}) {
    if (void* found = dlsym(own_library(), (std::string(symbol) + suffix).c_str())) return found;
  }
  return nullptr;
}

cudaError_t look_up(const char* name, const char* symbol, void** function,
                    cudaDriverEntryPointQueryResult* status) {
  return api(name, kPlain, {Arg::of_text("symbol", symbol)}, [&](Call&) {
    *function = entry_point(symbol);
    if (status)
      *status = *function ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
    return cudaSuccess;
  });
}

// A context is a device, counted from 1.
CUcontext context_of(int device) {
  return reinterpret_cast<CUcontext>(static_cast<uintptr_t>(device + 1));
}
int device_of(CUcontext context) {
  return static_cast<int>(reinterpret_cast<uintptr_t>(context)) - 1;
}

thread_local int t_pushed[64];
thread_local int t_depth = 0;

}  // namespace
}  // namespace egm_sim

using namespace egm_sim;

extern "C" {

cudaError_t cudaGetDriverEntryPointByVersion(const char* symbol, void** function, unsigned,
                                             unsigned long long,
                                             cudaDriverEntryPointQueryResult* status) {
  return look_up("cudaGetDriverEntryPointByVersion", symbol, function, status);
}

cudaError_t cudaGetDriverEntryPoint(const char* symbol, void** function, unsigned long long,
                                    cudaDriverEntryPointQueryResult* status) {
  return look_up("cudaGetDriverEntryPoint", symbol, function, status);
}

CUresult cuGetProcAddress(const char* symbol, void** function, int, cuuint64_t,
                          CUdriverProcAddressQueryResult* status) {
  *function = entry_point(symbol);
  if (status) {
    *status = *function ? CU_GET_PROC_ADDRESS_SUCCESS : CU_GET_PROC_ADDRESS_SYMBOL_NOT_FOUND;
  }
  return *function ? CUDA_SUCCESS : CUDA_ERROR_NOT_FOUND;
}

CUresult cuInit(unsigned) {
  return api<CUresult>("cuInit", kPlain, {}, [](Call&) { return CUDA_SUCCESS; });
}

CUresult cuDriverGetVersion(int* version) {
  *version = CUDA_VERSION;
  return CUDA_SUCCESS;
}

CUresult cuDeviceGetCount(int* count) {
  return api<CUresult>("cuDeviceGetCount", kQuiet, {}, [&](Call&) {
    *count = machine().devices;
    return CUDA_SUCCESS;
  });
}

CUresult cuDeviceGet(CUdevice* device, int ordinal) {
  return api<CUresult>("cuDeviceGet", kQuiet, {{"device", ordinal}}, [&](Call&) {
    if (!device_exists(ordinal)) return CUDA_ERROR_INVALID_DEVICE;
    *device = ordinal;
    return CUDA_SUCCESS;
  });
}

CUresult cuDeviceGetName(char* name, int length, CUdevice) {
  std::snprintf(name, static_cast<size_t>(length), "%s", machine().preset->device_name);
  return CUDA_SUCCESS;
}

CUresult cuDeviceTotalMem(size_t* bytes, CUdevice device) {
  return api<CUresult>("cuDeviceTotalMem", kQuiet, {{"device", device}}, [&](Call&) {
    *bytes = hbm(device).capacity;
    return CUDA_SUCCESS;
  });
}

CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute which, CUdevice device) {
  return api<CUresult>("cuDeviceGetAttribute", kQuiet, {{"attribute", which}}, [&](Call&) {
    if (!device_exists(device)) return CUDA_ERROR_INVALID_DEVICE;
    *value = device_attribute(which, device);
    return CUDA_SUCCESS;
  });
}

CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice device) {
  return api<CUresult>("cuDevicePrimaryCtxRetain", kQuiet, {{"device", device}}, [&](Call&) {
    if (!device_exists(device)) return CUDA_ERROR_INVALID_DEVICE;
    *context = context_of(device);
    return CUDA_SUCCESS;
  });
}

CUresult cuDevicePrimaryCtxRelease(CUdevice) { return CUDA_SUCCESS; }

CUresult cuDevicePrimaryCtxGetState(CUdevice, unsigned* flags, int* active) {
  *flags = 0;
  *active = 1;
  return CUDA_SUCCESS;
}

CUresult cuCtxGetCurrent(CUcontext* context) {
  *context = context_of(current_device());
  return CUDA_SUCCESS;
}

CUresult cuCtxSetCurrent(CUcontext context) {
  if (context) set_current_device(device_of(context));
  return CUDA_SUCCESS;
}

CUresult cuCtxPushCurrent(CUcontext context) {
  if (t_depth == 64) return CUDA_ERROR_INVALID_VALUE;
  t_pushed[t_depth++] = current_device();
  return cuCtxSetCurrent(context);
}

CUresult cuCtxPopCurrent(CUcontext* context) {
  if (t_depth == 0) return CUDA_ERROR_INVALID_CONTEXT;
  if (context) *context = context_of(current_device());
  set_current_device(t_pushed[--t_depth]);
  return CUDA_SUCCESS;
}

CUresult cuCtxGetDevice(CUdevice* device) {
  *device = current_device();
  return CUDA_SUCCESS;
}

CUresult cuGetErrorString(CUresult error, const char** text) {
  *text = error_text(error);
  return CUDA_SUCCESS;
}

CUresult cuGetErrorName(CUresult error, const char** name) {
  *name = error_name(error);
  return *name ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

}  // extern "C"
