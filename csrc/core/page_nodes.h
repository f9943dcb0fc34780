// Which NUMA node of the host each page of an address range is on, asked from the kernel.
// Pure system calls; nothing here touches CUDA.
#pragma once

#include <map>

#include "core/units.h"

namespace egm {

struct PageNodes {
  std::map<int, Bytes> by_node;
  // Not mapped for the CPU: on a GPU that the CPU does not share page tables with, or nowhere yet.
  Bytes unmapped;
};

// Rounds the range out to whole pages. Throws std::system_error if the kernel refuses.
PageNodes page_nodes(const void* address, Bytes size);

// About how much of the range is not in memory of the host, judged by some of its pages: quick for
// ranges of any size. All of it if the kernel refuses to say. `hbm_node` is the NUMA node that is
// the GPU's memory, or -1.
Bytes estimate_off_host(const void* address, Bytes size, int hbm_node) noexcept;

}  // namespace egm
