// Which folders describe the control groups of this process, and the limits in them.
// The files: the kernel's Documentation/admin-guide/cgroup-v2.rst and cgroup-v1/memory.rst; how
// they are found: proc_pid_cgroup(5), proc_pid_mountinfo(5), cgroup_namespaces(7).
#include "core/cgroup_memory.h"

#include <sys/stat.h>

#include <algorithm>
#include <array>
#include <filesystem>
#include <optional>
#include <string_view>
#include <system_error>

#include "core/kernel_files.h"

namespace egm {
namespace {

struct Version {
  int number;
  const char* filesystem;
  const char* usual_mount;
  std::array<const char*, 2> limits;  // may be null
  const char* usage;
  // Counts the group's descendants too, as `usage` does.
  const char* reclaimable;
};

// Above memory.high a group is not killed but stalled by reclaim, which is as good as a limit.
constexpr Version kVersion2{2,
                            "cgroup2",
                            "/sys/fs/cgroup",
                            {"memory.max", "memory.high"},
                            "memory.current",
                            "inactive_file"};
constexpr Version kVersion1{1,
                            "cgroup",
                            "/sys/fs/cgroup/memory",
                            {"memory.limit_in_bytes", nullptr},
                            "memory.usage_in_bytes",
                            "total_inactive_file"};
// Version 1 has no word for "no limit" but a number just below 2^63.
constexpr Bytes kNoLimit(1ULL << 62);

// A mounted hierarchy: the group `group` is what is seen at `folder`.
struct Mount {
  std::string group;
  std::string folder;
};

bool lists_memory(const std::string& names) {
  const auto all = split(names, ',');
  return std::find(all.begin(), all.end(), "memory") != all.end();
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
std::optional<std::string> own_group(const Version& version, const std::string& root) {
  const auto text = read_text(root + "/proc/self/cgroup");
  if (!text) return std::nullopt;
  for (const auto& line : split(*text, '\n')) {
    const auto first = line.find(':');
    const auto second = first == std::string::npos ? first : line.find(':', first + 1);
    if (second == std::string::npos) continue;
    const auto controllers = line.substr(first + 1, second - first - 1);
    const bool ours =
        version.number == 2 ? line.compare(0, 3, "0::") == 0 : lists_memory(controllers);
    if (ours) return line.substr(second + 1);
  }
  return std::nullopt;
}

std::vector<Mount> mounts(const Version& version, const std::string& root) {
  std::vector<Mount> found;
  const auto text = read_text(root + "/proc/self/mountinfo");
  for (const auto& line : split(text ? *text : "", '\n')) {
    const auto fields = split(line, ' ');
    const auto dash = std::find(fields.begin(), fields.end(), "-");
    if (dash - fields.begin() < 5 || fields.end() - dash < 4 || dash[1] != version.filesystem) {
      continue;
    }
    if (version.number == 1 && !lists_memory(dash[3])) continue;
    found.push_back({unescaped(fields[3]), unescaped(fields[4])});
  }
  if (found.empty()) found.push_back({"/", version.usual_mount});
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

// By its folder's inode: the path depends on the mount and the namespace.
uint64_t number_of(const std::string& folder) {
  struct stat status{};
  if (stat(folder.c_str(), &status) != 0) return group_number(folder);
  return group_number(std::to_string(status.st_dev) + ":" + std::to_string(status.st_ino));
}

void add_limits(const Version& version, const std::string& folder, const std::string& group,
                std::vector<MemoryLimit>& found) {
  for (const char* name : version.limits) {
    const auto limit = name ? read_size(folder + "/" + name) : std::nullopt;  // "max" is no number
    if (!limit || *limit >= kNoLimit) continue;
    // Asked for late, because they cost the kernel more than the limits, which are mostly not set.
    const auto usage = read_size(folder + "/" + version.usage);
    if (!usage) return;
    // Of the page cache only what was not used lately: the rest may be needed again at once.
    const auto cache = size_at(read_sizes(folder + "/memory.stat"), version.reclaimable);
    const Bytes used = difference_or_zero(*usage, cache.value_or(Bytes(0)));
    found.push_back({*limit, difference_or_zero(*limit, used),
                     "cgroup limit of " + (group.empty() ? "/" : group) + " (" + name + ")",
                     number_of(folder)});
  }
}

void add_levels(const Version& version, const std::string& root, std::vector<MemoryLimit>& found) {
  const auto group = own_group(version, root);
  if (!group) return;
  const auto all = mounts(version, root);
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
  while (true) {
    add_limits(version, root + mount.folder + rest, above + rest, found);
    if (rest.empty()) return;
    rest.erase(rest.rfind('/'));
  }
}

}  // namespace

// FNV-1a, because processes of different builds compare the numbers.
uint64_t group_number(std::string_view identity) {
  uint64_t number = 0xcbf29ce484222325;
  for (const char each : identity) {
    number = (number ^ static_cast<unsigned char>(each)) * 0x100000001b3;
  }
  return number == 0 ? 1 : number;
}

std::vector<MemoryLimit> cgroup_limits(const std::string& root) {
  std::vector<MemoryLimit> found;
  add_levels(kVersion2, root, found);
  add_levels(kVersion1, root, found);
  return found;
}

}  // namespace egm
