// How much host memory there is and how much of it may still be taken, asked from the kernel.
// Pure reading of /proc and /sys; what must stay free of it is in reserve.h.
#pragma once

#include <optional>
#include <set>
#include <string>
#include <vector>

#include "core/cgroup_memory.h"
#include "core/memory_policy.h"
#include "core/units.h"

namespace egm {

struct HostMemory {
  Bytes total;      // of the nodes and the control groups this process may use
  Bytes available;  // what can be taken now without pushing anything out: the least of all limits
  std::string limited_by;  // which limit that is, for messages
};

// Every limit on what this process may take, the tightest first.
//
// hbm_nodes: NUMA nodes that are GPU memory (GH200, GB200): the kernel counts them in
// MemAvailable, and here they do not count. `root` goes before /proc and /sys, and `bound` is what
// the calling thread's memory policy says, both for tests.
// Seen are MemAvailable, the cpuset, that policy (numactl --membind), and control groups of both
// versions. Limits that cannot be read are skipped; throws std::runtime_error, which names the
// file, if there is none left.
std::vector<MemoryLimit> host_limits(const std::set<int>& hbm_nodes, const std::string& root = "",
                                     const std::optional<std::set<int>>& bound = bound_nodes());
// Of the limits, which must not be none, the one with the least total.
const MemoryLimit& least_total(const std::vector<MemoryLimit>& limits);
// And what they come to.
HostMemory host_memory(const std::set<int>& hbm_nodes, const std::string& root = "",
                       const std::optional<std::set<int>>& bound = bound_nodes());

// Bytes of EGM carve-outs: memory that the kernel does not own, reachable only through the GPU's
// driver. Nothing if the driver shows none.
std::optional<Bytes> egm_carveout(const std::string& root = "");

}  // namespace egm
