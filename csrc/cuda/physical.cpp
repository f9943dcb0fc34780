// Physical memory by cuMemCreate.
#include "cuda/physical.h"

#include <cuda_runtime_api.h>

#include <algorithm>
#include <chrono>
#include <string>
#include <thread>
#include <utility>

#include "cuda/driver.h"
#include "cuda/errors.h"
#include "cuda/traits.h"

namespace egm {
namespace {

// After so much of host memory there is a pause of so long; both are arbitrary.
constexpr Bytes kBetweenPauses = mib(8);
constexpr auto kPause = std::chrono::microseconds(50);

CUmemAllocationProp properties(const Site& site) {
  CUmemAllocationProp result{};
  result.type = CU_MEM_ALLOCATION_TYPE_PINNED;
  result.location.type =
      site.on_device ? CU_MEM_LOCATION_TYPE_DEVICE : CU_MEM_LOCATION_TYPE_HOST_NUMA;
  result.location.id = site.on_device ? site.device : site.host_node;
  return result;
}

Bytes granularity_at(const Site& site) {
  const auto wanted = properties(site);
  size_t unit = 0;
  check(driver().granularity(&unit, &wanted, CU_MEM_ALLOC_GRANULARITY_RECOMMENDED),
        "cuMemGetAllocationGranularity", Bytes(0), site.device);
  return Bytes(unit);
}

}  // namespace

int host_node_of(DeviceIndex device) {
  int supported = 0;
  // The attribute is the driver's and has no name in the runtime.
  const auto name = static_cast<cudaDeviceAttr>(
      CU_DEVICE_ATTRIBUTE_HOST_NUMA_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED);
  if (cudaDeviceGetAttribute(&supported, name, device) != cudaSuccess) cudaGetLastError();
  if (supported == 0) {
    throw CudaError("device " + std::to_string(device) +
                        " or its driver cannot map memory of a host NUMA node "
                        "(CU_DEVICE_ATTRIBUTE_HOST_NUMA_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED is 0); "
                        "use the backing 'pinned' or 'managed'",
                    cudaErrorNotSupported);
  }
  return std::max(device_attribute(cudaDevAttrHostNumaId, device),
                  0);  // -1 on hosts without NUMA, where node 0 is all there is
}

Bytes granularity_of(DeviceIndex device, std::optional<int> host_node) {
  const Bytes in_hbm = granularity_at({device, true});
  return host_node ? std::max(in_hbm, granularity_at({device, false, *host_node})) : in_hbm;
}

void DriverPauses::after(Bytes taken) {
  since_last_ = since_last_ + taken;
  if (since_last_ < kBetweenPauses) return;
  std::this_thread::sleep_for(kPause);
  since_last_ = Bytes(0);
}

Physical::Physical(Bytes size, const Site& site) {
  const auto wanted = properties(site);
  check(driver().create(&handle_, size.count(), &wanted, 0), "cuMemCreate", size, site.device);
}

Physical::~Physical() {
  if (handle_ != 0) driver().release(handle_);
}

CUmemGenericAllocationHandle Physical::leave() noexcept { return std::exchange(handle_, 0); }

}  // namespace egm
