// The limits of the control groups of this process on host memory.
// The files: the kernel's Documentation/admin-guide/cgroup-v2.rst and cgroup-v1/memory.rst.
#include "core/cgroup_memory.h"

#include <sys/stat.h>

#include <array>
#include <optional>

#include "core/cgroups.h"
#include "core/kernel_files.h"

namespace egm {
namespace {

struct Version {
  int number;
  std::array<const char*, 2> limits;  // may be null
  const char* usage;
  // Counts the group's descendants too, as `usage` does.
  const char* reclaimable;
};

// Above memory.high a group is not killed but stalled by reclaim, which is as good as a limit.
constexpr Version kVersion2{2, {"memory.max", "memory.high"}, "memory.current", "inactive_file"};
constexpr Version kVersion1{
    1, {"memory.limit_in_bytes", nullptr}, "memory.usage_in_bytes", "total_inactive_file"};
// Version 1 has no word for "no limit" but a number just below 2^63.
constexpr Bytes kNoLimit(1ULL << 62);

// By its folder's inode: the path depends on the mount and the namespace.
uint64_t number_of(const std::string& folder) {
  struct stat status{};
  if (stat(folder.c_str(), &status) != 0) return group_number(folder);
  return group_number(std::to_string(status.st_dev) + ":" + std::to_string(status.st_ino));
}

void add_limits(const Version& version, const ControlGroup& group,
                std::vector<MemoryLimit>& found) {
  for (const char* name : version.limits) {
    // "max" is no number.
    const auto limit = name ? read_size(group.folder + "/" + name) : std::nullopt;
    if (!limit || *limit >= kNoLimit) continue;
    // Asked for late, because they cost the kernel more than the limits, which are mostly not set.
    const auto usage = read_size(group.folder + "/" + version.usage);
    if (!usage) return;
    // Of the page cache only what was not used lately: the rest may be needed again at once.
    const auto cache = size_at(read_sizes(group.folder + "/memory.stat"), version.reclaimable);
    const Bytes used = difference_or_zero(*usage, cache.value_or(Bytes(0)));
    found.push_back({*limit, difference_or_zero(*limit, used),
                     "cgroup limit of " + group.name + " (" + name + ")", number_of(group.folder)});
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
  for (const Version& version : {kVersion2, kVersion1}) {
    for (const auto& group : control_groups(version.number, "memory", root)) {
      add_limits(version, group, found);
    }
  }
  return found;
}

}  // namespace egm
