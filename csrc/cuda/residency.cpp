// Where the bytes of an address range are now.
#include "cuda/residency.h"

#include <cuda_runtime_api.h>

#include "core/page_nodes.h"
#include "cuda/errors.h"

namespace egm {
namespace {

const char* name_of(cudaMemoryType type) {
  switch (type) {
    case cudaMemoryTypeManaged:
      return "managed";
    case cudaMemoryTypeDevice:
      return "device";
    case cudaMemoryTypeHost:
      return "host";
    default:
      return "unregistered";
  }
}

// The NUMA node that is the device's memory, or -1.
int node_of(DeviceIndex device) {
  int config = cudaDeviceNumaConfigNone;
  check(cudaDeviceGetAttribute(&config, cudaDevAttrNumaConfig, device), "cudaDeviceGetAttribute",
        Bytes(0), device);
  if (config != cudaDeviceNumaConfigNumaNode) return -1;
  int node = -1;
  check(cudaDeviceGetAttribute(&node, cudaDevAttrNumaId, device), "cudaDeviceGetAttribute",
        Bytes(0), device);
  return node;
}

}  // namespace

Residency residency(const void* address, Bytes size, DeviceIndex device) {
  cudaPointerAttributes attributes{};
  check(cudaPointerGetAttributes(&attributes, address), "cudaPointerGetAttributes", size, device);
  Residency result;
  result.memory_type = name_of(attributes.type);
  const int device_node = node_of(device);
  const PageNodes pages = page_nodes(address, size);
  for (const auto& [node, bytes] : pages.by_node) {
    Bytes& sum = node == device_node ? result.device_node : result.host;
    sum = sum + bytes;
  }
  result.unmapped = pages.unmapped;
  return result;
}

}  // namespace egm
