// Where the bytes of an address range are now.
#include "cuda/residency.h"

#include <cuda_runtime_api.h>

#include "core/page_nodes.h"
#include "cuda/errors.h"
#include "cuda/traits.h"

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

}  // namespace

Residency residency(const void* address, Bytes size, DeviceIndex device) {
  cudaPointerAttributes attributes{};
  check(cudaPointerGetAttributes(&attributes, address), "cudaPointerGetAttributes", size, device);
  Residency result;
  result.memory_type = name_of(attributes.type);
  const int device_node = hbm_numa_node(device);
  const PageNodes pages = page_nodes(address, size);
  for (const auto& [node, bytes] : pages.by_node) {
    Bytes& sum = node == device_node ? result.device_node : result.host;
    sum = sum + bytes;
  }
  result.unmapped = pages.unmapped;
  return result;
}

}  // namespace egm
