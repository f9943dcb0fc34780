// What the control groups of this process let it take of host memory, of version 1 and 2.
#pragma once

#include <string>
#include <vector>

#include "core/units.h"

namespace egm {

// One of the bounds on host memory, whichever part of the kernel sets it.
struct MemoryLimit {
  Bytes total;
  Bytes available;
  std::string name;
};

// One for each limit that is set and can be read, from the group of this process up to the root.
// `root` goes before /proc and /sys.
std::vector<MemoryLimit> cgroup_limits(const std::string& root);

}  // namespace egm
