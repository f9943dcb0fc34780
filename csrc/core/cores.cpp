// CPU affinity by sched_getaffinity(2), and the quotas of control groups.
// The files: the kernel's Documentation/admin-guide/cgroup-v2.rst and scheduler/sched-bwc.rst.
#include "core/cores.h"

#include <sched.h>

#include <algorithm>
#include <string_view>
#include <thread>

#include "core/cgroups.h"
#include "core/kernel_files.h"

namespace egm {
namespace {

// No quota is no number: "max" in version 2, -1 in version 1.
void lower(std::optional<uint64_t>& least, std::string_view quota, std::string_view period) {
  const auto most = parse_number(quota);
  const auto per = parse_number(period);
  if (!most || !per || *per == 0) return;
  const uint64_t cores = std::max<uint64_t>(1, *most / *per);
  least = least ? std::min(*least, cores) : cores;
}

}  // namespace

std::optional<uint64_t> quota_cores(const std::string& root) {
  std::optional<uint64_t> least;
  for (const auto& group : control_groups(2, "cpu", root)) {
    const auto words = split(read_text(group.folder + "/cpu.max").value_or(""), ' ');
    if (words.size() == 2) lower(least, words[0], words[1]);
  }
  for (const auto& group : control_groups(1, "cpu", root)) {
    lower(least, read_text(group.folder + "/cpu.cfs_quota_us").value_or(""),
          read_text(group.folder + "/cpu.cfs_period_us").value_or(""));
  }
  return least;
}

unsigned usable_cores(const std::string& root) {
  cpu_set_t set;
  unsigned cores = std::max(1U, std::thread::hardware_concurrency());
  if (sched_getaffinity(0, sizeof set, &set) == 0) {
    cores = static_cast<unsigned>(std::max(1, CPU_COUNT(&set)));
  }
  return static_cast<unsigned>(std::min<uint64_t>(cores, quota_cores(root).value_or(cores)));
}

}  // namespace egm
