// What vmm.cpp and vmm_access.cpp share: the books of mappings. Callers hold the lock.
#pragma once

#include <cuda.h>

#include <cstddef>
#include <cstdint>
#include <map>
#include <utility>

#include "memory.h"

namespace egm_sim {

constexpr uint64_t kCpu = uint64_t{1} << 63;

struct Physical {
  Piece piece;
  size_t size;
  CUmemAllocationProp properties;
  char* open;        // the mapping that is always accessible
  int handles = 1;   // not yet released
  int mappings = 0;  // alive
};
struct Mapping {
  CUdeviceptr base;
  size_t size;
  Physical* physical;
  uint64_t readers = 0;  // one bit a device, and kCpu
  uint64_t writers = 0;
};
using Mappings = std::map<CUdeviceptr, Mapping>;

Mappings& mappings();
// The mapping that contains an address, or nullptr.
Mapping* mapping_of(CUdeviceptr ptr);
// The mappings that make up a range exactly; none if it has holes or cuts one.
std::pair<Mappings::iterator, Mappings::iterator> whole_mappings(CUdeviceptr ptr, size_t size);
bool is_reserved(CUdeviceptr ptr, size_t size);

}  // namespace egm_sim
