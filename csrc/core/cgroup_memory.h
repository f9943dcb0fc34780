// What the control groups of this process let it take of host memory, of version 1 and 2.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "core/units.h"

namespace egm {

// One of the bounds on host memory, whichever part of the kernel sets it.
struct MemoryLimit {
  Bytes total;
  Bytes available;
  std::string name;
  // Equal for processes that the limit holds for together, in whatever namespaces; 0 for those of
  // the whole host.
  uint64_t group = 0;
};

// A number for a group, from what tells it from others: never 0.
uint64_t group_number(std::string_view identity);

// One for each limit that is set and can be read, from the group of this process up to the root.
// `root` goes before /proc and /sys.
std::vector<MemoryLimit> cgroup_limits(const std::string& root);

}  // namespace egm
