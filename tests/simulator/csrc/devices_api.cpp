// CUDA functions that describe and choose devices, and those on errors and versions.
#include <cstdio>
#include <cstring>
#include <vector>

#include "machine.h"
#include "memory.h"
#include "streams.h"

namespace egm_sim {
namespace {

constexpr int kVersion = CUDART_VERSION;

bool exists(int device) { return device >= 0 && device < machine().devices; }

int shared_memory_optin() { return machine().preset->major == 12 ? 99 << 10 : 227 << 10; }

// Limits that all the simulated GPUs share; those that differ come from the preset.
int attribute(int which, int device) {
  const Preset& p = *machine().preset;
  switch (which) {
    case cudaDevAttrMaxThreadsPerBlock:
    case cudaDevAttrMaxBlockDimX:
    case cudaDevAttrMaxBlockDimY:
      return 1024;
    case cudaDevAttrMaxBlockDimZ:
      return 64;
    case cudaDevAttrMaxGridDimX:
      return 2147483647;
    case cudaDevAttrMaxGridDimY:
    case cudaDevAttrMaxGridDimZ:
      return 65535;
    case cudaDevAttrMaxSharedMemoryPerBlock:
      return 48 << 10;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      return shared_memory_optin();
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      return shared_memory_optin() + (1 << 10);
    case cudaDevAttrReservedSharedMemoryPerBlock:
      return 1 << 10;
    case cudaDevAttrTotalConstantMemory:
      return 64 << 10;
    case cudaDevAttrWarpSize:
      return 32;
    case cudaDevAttrMaxRegistersPerBlock:
    case cudaDevAttrMaxRegistersPerMultiprocessor:
      return 65536;
    case cudaDevAttrMultiProcessorCount:
      return p.multiprocessors;
    case cudaDevAttrMaxThreadsPerMultiProcessor:
      return p.major == 12 ? 1536 : 2048;
    case cudaDevAttrMaxBlocksPerMultiprocessor:
      return 32;
    case cudaDevAttrComputeCapabilityMajor:
      return p.major;
    case cudaDevAttrComputeCapabilityMinor:
      return p.minor;
    case cudaDevAttrClockRate:
    case cudaDevAttrMemoryClockRate:
      return 1500000;
    case cudaDevAttrGlobalMemoryBusWidth:
      return 5120;
    case cudaDevAttrL2CacheSize:
      return 50 << 20;
    case cudaDevAttrTextureAlignment:
    case cudaDevAttrSurfaceAlignment:
      return 512;
    case cudaDevAttrMaxPitch:
      return 2147483647;
    case cudaDevAttrAsyncEngineCount:
      return 3;
    case cudaDevAttrPciBusId:
      return 1 + device;
    case cudaDevAttrIntegrated:
      return p.integrated;
    case cudaDevAttrConcurrentManagedAccess:
      return p.concurrent_managed;
    case cudaDevAttrPageableMemoryAccess:
    case cudaDevAttrPageableMemoryAccessUsesHostPageTables:
      return p.coherent;
    case cudaDevAttrHostNativeAtomicSupported:
    case cudaDevAttrDirectManagedMemAccessFromHost:
      return p.direct_host_access;
    case cudaDevAttrNumaConfig:
      return p.hbm_is_node ? cudaDeviceNumaConfigNumaNode : cudaDeviceNumaConfigNone;
    case cudaDevAttrNumaId:
      return device_node(device);
    case cudaDevAttrHostNumaId:
      return host_node_of(device);
    case CU_DEVICE_ATTRIBUTE_HOST_NUMA_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED:
      return machine().host_numa_vmm;
    case cudaDevAttrCanUseHostPointerForRegisteredMem:
      return machine().registered_at_host_address;
    case cudaDevAttrGpuOverlap:
    case cudaDevAttrCanMapHostMemory:
    case cudaDevAttrConcurrentKernels:
    case cudaDevAttrUnifiedAddressing:
    case cudaDevAttrStreamPrioritiesSupported:
    case cudaDevAttrGlobalL1CacheSupported:
    case cudaDevAttrLocalL1CacheSupported:
    case cudaDevAttrManagedMemory:
    case cudaDevAttrComputePreemptionSupported:
    case cudaDevAttrCooperativeLaunch:
    case cudaDevAttrHostRegisterSupported:
    case cudaDevAttrMemoryPoolsSupported:
    case cudaDevAttrClusterLaunch:
    case cudaDevAttrIpcEventSupport:
    case cudaDevAttrHostNumaMemoryPoolsSupported:
    case cudaDevAttrHostMemoryPoolsSupported:
    case CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED:
    case CU_DEVICE_ATTRIBUTE_CAN_USE_64_BIT_STREAM_MEM_OPS_V1:
    case CU_DEVICE_ATTRIBUTE_CAN_USE_STREAM_WAIT_VALUE_NOR_V1:
      return 1;
    default:
      return 0;  // not supported
  }
}

void describe(cudaDeviceProp& p, int device) {
  const auto get = [&](int which) { return attribute(which, device); };
  std::memset(&p, 0, sizeof p);
  std::snprintf(p.name, sizeof p.name, "%s", machine().preset->device_name);
  std::snprintf(p.uuid.bytes, sizeof p.uuid.bytes, "egm-sim-%d", device);
  p.totalGlobalMem = hbm(device).capacity;
  p.sharedMemPerBlock = get(cudaDevAttrMaxSharedMemoryPerBlock);
  p.regsPerBlock = get(cudaDevAttrMaxRegistersPerBlock);
  p.warpSize = get(cudaDevAttrWarpSize);
  p.memPitch = get(cudaDevAttrMaxPitch);
  p.maxThreadsPerBlock = get(cudaDevAttrMaxThreadsPerBlock);
  for (int i = 0; i < 3; ++i) {
    p.maxThreadsDim[i] = get(cudaDevAttrMaxBlockDimX + i);
    p.maxGridSize[i] = get(cudaDevAttrMaxGridDimX + i);
  }
  p.totalConstMem = get(cudaDevAttrTotalConstantMemory);
  p.major = get(cudaDevAttrComputeCapabilityMajor);
  p.minor = get(cudaDevAttrComputeCapabilityMinor);
  p.textureAlignment = p.texturePitchAlignment = get(cudaDevAttrTextureAlignment);
  p.multiProcessorCount = get(cudaDevAttrMultiProcessorCount);
  p.integrated = get(cudaDevAttrIntegrated);
  p.canMapHostMemory = p.concurrentKernels = p.unifiedAddressing = 1;
  p.pciBusID = get(cudaDevAttrPciBusId);
  p.asyncEngineCount = get(cudaDevAttrAsyncEngineCount);
  p.memoryBusWidth = get(cudaDevAttrGlobalMemoryBusWidth);
  p.l2CacheSize = get(cudaDevAttrL2CacheSize);
  p.maxThreadsPerMultiProcessor = get(cudaDevAttrMaxThreadsPerMultiProcessor);
  p.streamPrioritiesSupported = p.globalL1CacheSupported = p.localL1CacheSupported = 1;
  p.sharedMemPerMultiprocessor = get(cudaDevAttrMaxSharedMemoryPerMultiprocessor);
  p.regsPerMultiprocessor = get(cudaDevAttrMaxRegistersPerMultiprocessor);
  p.managedMemory = get(cudaDevAttrManagedMemory);
  p.hostNativeAtomicSupported = get(cudaDevAttrHostNativeAtomicSupported);
  p.pageableMemoryAccess = get(cudaDevAttrPageableMemoryAccess);
  p.concurrentManagedAccess = get(cudaDevAttrConcurrentManagedAccess);
  p.computePreemptionSupported = p.cooperativeLaunch = 1;
  p.canUseHostPointerForRegisteredMem = get(cudaDevAttrCanUseHostPointerForRegisteredMem);
  p.sharedMemPerBlockOptin = get(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  p.pageableMemoryAccessUsesHostPageTables = get(cudaDevAttrPageableMemoryAccessUsesHostPageTables);
  p.directManagedMemAccessFromHost = get(cudaDevAttrDirectManagedMemAccessFromHost);
  p.maxBlocksPerMultiProcessor = get(cudaDevAttrMaxBlocksPerMultiprocessor);
  p.reservedSharedMemPerBlock = get(cudaDevAttrReservedSharedMemoryPerBlock);
  p.hostRegisterSupported = p.memoryPoolsSupported = p.ipcEventSupported = p.clusterLaunch = 1;
  p.deviceNumaConfig = get(cudaDevAttrNumaConfig);
  p.deviceNumaId = get(cudaDevAttrNumaId);
  p.hostNumaId = get(cudaDevAttrHostNumaId);
}

template <class Body>
cudaError_t on_device(const char* name, unsigned traits, int device, Body body) {
  return api(name, traits, {{"device", device}}, [&](Call&) -> cudaError_t {
    return exists(device) ? body() : cudaErrorInvalidDevice;
  });
}

uint64_t& peers(int device) {
  static auto* const enabled = new std::vector<uint64_t>(machine().devices);
  return (*enabled)[device];
}

}  // namespace

int device_attribute(int which, int device) { return attribute(which, device); }
bool device_exists(int device) { return exists(device); }

}  // namespace egm_sim

using namespace egm_sim;

extern "C" {

cudaError_t cudaGetDeviceCount(int* count) {
  *count = 0;
  return api("cudaGetDeviceCount", kQuiet, {}, [&](Call&) {
    *count = machine().devices;
    return cudaSuccess;
  });
}

cudaError_t cudaGetDevice(int* device) {
  return api("cudaGetDevice", kQuiet, {}, [&](Call&) {
    *device = current_device();
    return cudaSuccess;
  });
}

cudaError_t cudaSetDevice(int device) {
  return on_device("cudaSetDevice", kPlain, device, [&] {
    set_current_device(device);
    return cudaSuccess;
  });
}

cudaError_t cudaInitDevice(int device, unsigned, unsigned) {
  return on_device("cudaInitDevice", kPlain, device, [] { return cudaSuccess; });
}

cudaError_t cudaSetDeviceFlags(unsigned) {
  return api("cudaSetDeviceFlags", kPlain, {}, [](Call&) { return cudaSuccess; });
}

cudaError_t cudaGetDeviceFlags(unsigned* flags) {
  return api("cudaGetDeviceFlags", kPlain, {}, [&](Call&) {
    *flags = 0;
    return cudaSuccess;
  });
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int device) {
  return on_device("cudaDeviceGetAttribute", kQuiet, device, [&] {
    *value = attribute(which, device);
    return cudaSuccess;
  });
}

cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int device) {
  return on_device("cudaGetDeviceProperties", kQuiet, device, [&] {
    describe(*properties, device);
    return cudaSuccess;
  });
}

cudaError_t cudaDeviceGetPCIBusId(char* out, int length, int device) {
  return on_device("cudaDeviceGetPCIBusId", kPlain, device, [&] {
    std::snprintf(out, static_cast<size_t>(length), "0000:%02X:00.0", 1 + device);
    return cudaSuccess;
  });
}

cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
  return api("cudaDeviceGetStreamPriorityRange", kQuiet, {}, [&](Call&) {
    *least = 0;
    *greatest = -5;
    return cudaSuccess;
  });
}

cudaError_t cudaDeviceSynchronize() {
  return api("cudaDeviceSynchronize", kUnsafeInCapture, {}, [](Call&) {
    complete_device(current_device());
    return cudaSuccess;
  });
}

cudaError_t cudaDeviceCanAccessPeer(int* can, int device, int peer) {
  return on_device("cudaDeviceCanAccessPeer", kPlain, device, [&] {
    if (!exists(peer)) return cudaErrorInvalidDevice;
    *can = machine().peer_access && device != peer;
    return cudaSuccess;
  });
}

cudaError_t cudaDeviceEnablePeerAccess(int peer, unsigned) {
  return api("cudaDeviceEnablePeerAccess", kPlain, {{"peer", peer}}, [&](Call&) {
    if (!exists(peer) || peer == current_device()) return cudaErrorInvalidDevice;
    if (!machine().peer_access) return cudaErrorPeerAccessUnsupported;
    uint64_t& enabled = peers(current_device());
    if (enabled >> peer & 1) return cudaErrorPeerAccessAlreadyEnabled;
    enabled |= uint64_t{1} << peer;
    return cudaSuccess;
  });
}

cudaError_t cudaDeviceDisablePeerAccess(int peer) {
  return api("cudaDeviceDisablePeerAccess", kPlain, {{"peer", peer}}, [&](Call&) {
    uint64_t& enabled = peers(current_device());
    if (!exists(peer) || !(enabled >> peer & 1)) return cudaErrorPeerAccessNotEnabled;
    enabled &= ~(uint64_t{1} << peer);
    return cudaSuccess;
  });
}

cudaError_t cudaDeviceGetP2PAttribute(int* value, cudaDeviceP2PAttr, int, int) {
  return api("cudaDeviceGetP2PAttribute", kPlain, {}, [&](Call&) {
    *value = machine().peer_access;
    return cudaSuccess;
  });
}

cudaError_t cudaDriverGetVersion(int* version) {
  return api("cudaDriverGetVersion", kQuiet | kNeedsNoDriver, {}, [&](Call&) {
    *version = machine().preset->has_driver ? kVersion : 0;
    return cudaSuccess;
  });
}

cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = kVersion;
  return cudaSuccess;
}

cudaError_t cudaGetLastError() { return take_last_error(); }
cudaError_t cudaPeekAtLastError() { return last_error(); }
const char* cudaGetErrorString(cudaError_t error) { return error_text(error); }
const char* cudaGetErrorName(cudaError_t error) {
  const char* name = error_name(error);
  return name ? name : "unrecognized error code";
}
cudaError_t cudaProfilerStart() { return cudaSuccess; }
cudaError_t cudaProfilerStop() { return cudaSuccess; }

}  // extern "C"
