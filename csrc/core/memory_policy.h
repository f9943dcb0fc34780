// A thread's memory policy (set_mempolicy(2); `numactl --membind`).
#pragma once

#include <optional>
#include <set>

namespace egm {

// The NUMA nodes that what this thread touches must come from; nothing if there is no such binding,
// or the kernel or a container does not say.
std::optional<std::set<int>> bound_nodes();

}  // namespace egm
