// Which folders describe the control groups of this process.
// How they are found: proc_pid_cgroup(5), proc_pid_mountinfo(5), cgroup_namespaces(7).
#include "core/cgroups.h"

#include <algorithm>
#include <filesystem>
#include <optional>
#include <string_view>
#include <system_error>

#include "core/kernel_files.h"

namespace egm {
namespace {

struct Hierarchy {
  int version;
  std::string controller;
};

// A mounted hierarchy: the group `group` is what is seen at `folder`.
struct Mount {
  std::string group;
  std::string folder;
};

bool lists(const std::string& names, const std::string& name) {
  const auto all = split(names, ',');
  return std::find(all.begin(), all.end(), name) != all.end();
}

// Spaces and the like are written as a backslash and three octal digits.
std::string unescaped(const std::string& text) {
  std::string result;
  for (size_t i = 0; i < text.size(); ++i) {
    const auto digits = std::string_view(text).substr(i + 1, 3);
    const bool escape = text[i] == '\\' && digits.size() == 3 &&
                        digits.find_first_not_of("01234567") == std::string_view::npos;
    if (escape) {
      result += static_cast<char>((digits[0] - '0') * 64 + (digits[1] - '0') * 8 + digits[2] - '0');
      i += 3;
    } else {
      result += text[i];
    }
  }
  return result;
}

// The group as /proc/self/cgroup has it: lines of "hierarchy:controllers:path".
std::optional<std::string> own_group(const Hierarchy& hierarchy, const std::string& root) {
  const auto text = read_text(root + "/proc/self/cgroup");
  if (!text) return std::nullopt;
  for (const auto& line : split(*text, '\n')) {
    const auto first = line.find(':');
    const auto second = first == std::string::npos ? first : line.find(':', first + 1);
    if (second == std::string::npos) continue;
    const auto controllers = line.substr(first + 1, second - first - 1);
    const bool ours = hierarchy.version == 2 ? line.compare(0, 3, "0::") == 0
                                             : lists(controllers, hierarchy.controller);
    if (ours) return line.substr(second + 1);
  }
  return std::nullopt;
}

std::vector<Mount> mounts(const Hierarchy& hierarchy, const std::string& root) {
  const char* const filesystem = hierarchy.version == 2 ? "cgroup2" : "cgroup";
  std::vector<Mount> found;
  const auto text = read_text(root + "/proc/self/mountinfo");
  for (const auto& line : split(text ? *text : "", '\n')) {
    const auto fields = split(line, ' ');
    const auto dash = std::find(fields.begin(), fields.end(), "-");
    if (dash - fields.begin() < 5 || fields.end() - dash < 4 || dash[1] != filesystem) continue;
    if (hierarchy.version == 1 && !lists(dash[3], hierarchy.controller)) continue;
    found.push_back({unescaped(fields[3]), unescaped(fields[4])});
  }
  if (found.empty()) {
    const std::string usual = "/sys/fs/cgroup";
    found.push_back({"/", hierarchy.version == 2 ? usual : usual + "/" + hierarchy.controller});
  }
  return found;
}

// Where `group` is below the mount, as "" or "/a/b"; nothing if it is not visible there, as in a
// container with another namespace than its mount.
std::optional<std::string> below(const Mount& mount, const std::string& group,
                                 const std::string& root) {
  std::string rest = group;
  if (mount.group != "/") {
    if (group.compare(0, mount.group.size(), mount.group) != 0) return std::nullopt;
    rest = group.substr(mount.group.size());
  }
  if (rest == "/") rest.clear();
  const bool leaves = rest.find("/..") != std::string::npos;
  if (leaves || (!rest.empty() && rest[0] != '/')) return std::nullopt;
  std::error_code ignored;
  if (!std::filesystem::is_directory(root + mount.folder + rest, ignored)) return std::nullopt;
  return rest;
}

}  // namespace

std::vector<ControlGroup> control_groups(int version, const std::string& controller,
                                         const std::string& root) {
  const Hierarchy hierarchy{version, controller};
  const auto group = own_group(hierarchy, root);
  if (!group) return {};
  const auto all = mounts(hierarchy, root);
  Mount mount = all.front();
  std::string rest;
  for (const auto& candidate : all) {
    const auto visible = below(candidate, *group, root);
    if (!visible) continue;
    mount = candidate;
    rest = *visible;
    break;
  }
  const std::string above = mount.group == "/" ? "" : mount.group;
  std::vector<ControlGroup> found;
  while (true) {
    const std::string name = above + rest;
    found.push_back({name.empty() ? "/" : name, root + mount.folder + rest});
    if (rest.empty()) return found;
    rest.erase(rest.rfind('/'));
  }
}

}  // namespace egm
