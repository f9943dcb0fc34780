// Which control groups this process is in, of version 1 and 2.
#pragma once

#include <string>
#include <vector>

namespace egm {

struct ControlGroup {
  std::string name;    // "/a/b"
  std::string folder;  // where its files are
};

// From the group of this process up to the root, or as far up as is mounted; none if it is in no
// hierarchy of that version. In version 1 each controller ("memory", "cpu") has its own groups.
// `root` goes before /proc and /sys.
std::vector<ControlGroup> control_groups(int version, const std::string& controller,
                                         const std::string& root);

}  // namespace egm
