// The limits on host memory that come from the machine and its NUMA nodes, and the least of all.
#include "core/host_memory.h"

#include <algorithm>
#include <map>
#include <stdexcept>
#include <utility>
#include <vector>

#include "core/kernel_files.h"

namespace egm {
namespace {

// Sizes by the number of the node; empty sizes if its file gave nothing. The numbers may have
// holes, and a kernel without NUMA has no nodes at all.
using Nodes = std::map<int, SizeTable>;

Nodes read_nodes(const std::string& root) {
  Nodes nodes;
  for (const auto& [number, folder] : numbered_entries(root + "/sys/devices/system/node", "node")) {
    nodes[number] = read_sizes(folder + "/meminfo");
  }
  return nodes;
}

Bytes size_or_zero(const SizeTable& sizes, const std::string& key) {
  return size_at(sizes, key).value_or(Bytes(0));
}

Bytes sum_of(const SizeTable& sizes, const std::vector<const char*>& keys) {
  Bytes sum;
  for (const char* key : keys) sum = saturated_sum(sum, size_or_zero(sizes, key));
  return sum;
}

bool can_be_read(const SizeTable& sizes) {
  return sizes.count("MemTotal") && sizes.count("MemFree");
}

// The least that can be taken from a node: what is free, and page cache that was not used lately
// (as for control groups). Active page cache and slabs may come back only in part.
Bytes at_least_available(const SizeTable& sizes) {
  return std::min(sum_of(sizes, {"MemFree", "Inactive(file)"}), size_or_zero(sizes, "MemTotal"));
}

// The most that a node can contribute to MemAvailable, so that what is left without it is never too
// much: the kernel (si_mem_available in mm/show_mem.c) counts free pages, the page cache on both
// lists and reclaimable kernel memory, less watermarks. FilePages would count shared memory, which
// MemAvailable does not.
Bytes at_most_counted(const SizeTable& sizes) {
  // KReclaimable includes SReclaimable, but only kernels since 4.20 have it.
  const char* const slabs = sizes.count("KReclaimable") ? "KReclaimable" : "SReclaimable";
  return std::min(sum_of(sizes, {"MemFree", "Active(file)", "Inactive(file)", slabs}),
                  size_or_zero(sizes, "MemTotal"));
}

std::string nodes_in_words(const std::vector<int>& numbers) {
  std::string text = numbers.size() == 1 ? "NUMA node" : "NUMA nodes";
  for (const int number : numbers) {
    text += (number == numbers.front() ? " " : ",") + std::to_string(number);
  }
  return numbers.empty() ? "no NUMA node" : text;
}

// What these nodes hold together; nothing if the file of one of them gave nothing.
std::optional<MemoryLimit> limit_of(const Nodes& nodes, const std::vector<int>& numbers,
                                    const std::string& why) {
  MemoryLimit limit{Bytes(0), Bytes(0), nodes_in_words(numbers) + " (" + why + ")"};
  for (const int number : numbers) {
    const SizeTable& sizes = nodes.at(number);
    if (!can_be_read(sizes)) return std::nullopt;
    limit.total = saturated_sum(limit.total, size_or_zero(sizes, "MemTotal"));
    limit.available = saturated_sum(limit.available, at_least_available(sizes));
  }
  return limit;
}

std::optional<MemoryLimit> machine_limit(const Nodes& nodes, const std::set<int>& hbm_nodes,
                                         const std::string& root) {
  const auto sizes = read_sizes(root + "/proc/meminfo");
  const auto total = size_at(sizes, "MemTotal");
  const auto available = size_at(sizes, "MemAvailable");
  if (!total || !available) return std::nullopt;
  MemoryLimit limit{*total, *available, "MemAvailable"};
  std::vector<int> excluded;
  std::vector<int> others;
  bool all_known = true;
  for (const auto& [number, of_node] : nodes) {
    if (!hbm_nodes.count(number)) {
      others.push_back(number);
      continue;
    }
    excluded.push_back(number);
    all_known = all_known && can_be_read(of_node);
    limit.total = difference_or_zero(limit.total, size_or_zero(of_node, "MemTotal"));
    limit.available = difference_or_zero(limit.available, at_most_counted(of_node));
  }
  // MemAvailable with an unknown amount of GPU memory in it says nothing; the other nodes do.
  if (!all_known) return limit_of(nodes, others, "the others are GPU memory");
  if (!excluded.empty()) limit.name += " without " + nodes_in_words(excluded) + " (GPU memory)";
  return limit;
}

// The ranges of "0-3,8"; nothing if that is not what it is.
std::optional<std::vector<std::pair<uint64_t, uint64_t>>> parse_ranges(const std::string& text) {
  std::vector<std::pair<uint64_t, uint64_t>> ranges;
  for (const auto& part : split(text, ',')) {
    const auto ends = split(part, '-');
    const auto first = parse_number(ends.front());
    const auto last = parse_number(ends.back());
    if (ends.size() > 2 || !first || !last || *first > *last) return std::nullopt;
    ranges.emplace_back(*first, *last);
  }
  return ranges;
}

// If something keeps this process from host memory that there is: what the nodes hold that it may
// use.
template <typename Allowed>
std::optional<MemoryLimit> limit_within(const Nodes& nodes, const std::set<int>& hbm_nodes,
                                        const std::string& why, const Allowed& allowed) {
  std::vector<int> usable;
  bool restricts = false;
  for (const auto& [number, sizes] : nodes) {
    if (hbm_nodes.count(number)) continue;
    const bool within = allowed(number);
    if (within) usable.push_back(number);
    restricts = restricts || (!within && size_or_zero(sizes, "MemTotal") > Bytes(0));
  }
  auto limit = restricts ? limit_of(nodes, usable, why) : std::nullopt;
  // Of processes on other nodes some may be on these too; that is not looked into.
  if (limit) limit->group = group_number(why + " " + nodes_in_words(usable));
  return limit;
}

std::optional<MemoryLimit> cpuset_limit(const Nodes& nodes, const std::set<int>& hbm_nodes,
                                        const std::string& root) {
  const std::string key = "Mems_allowed_list:";
  const auto status = read_text(root + "/proc/self/status");
  for (const auto& line : split(status ? *status : "", '\n')) {
    if (line.compare(0, key.size(), key) != 0) continue;
    const auto allowed = parse_ranges(line.substr(key.size()));
    if (!allowed) return std::nullopt;
    return limit_within(nodes, hbm_nodes, "cpuset", [&](int number) {
      const auto at = static_cast<uint64_t>(number);
      return std::any_of(allowed->begin(), allowed->end(), [at](const auto& range) {
        return range.first <= at && at <= range.second;
      });
    });
  }
  return std::nullopt;
}

std::optional<MemoryLimit> policy_limit(const Nodes& nodes, const std::set<int>& hbm_nodes,
                                        const std::optional<std::set<int>>& bound) {
  if (!bound) return std::nullopt;
  return limit_within(nodes, hbm_nodes, "memory policy",
                      [&](int number) { return bound->count(number) != 0; });
}

}  // namespace

std::vector<MemoryLimit> host_limits(const std::set<int>& hbm_nodes, const std::string& root,
                                     const std::optional<std::set<int>>& bound) {
  const Nodes nodes = read_nodes(root);
  std::vector<MemoryLimit> limits = cgroup_limits(root);
  for (const auto& limit :
       {machine_limit(nodes, hbm_nodes, root), cpuset_limit(nodes, hbm_nodes, root),
        policy_limit(nodes, hbm_nodes, bound)}) {
    if (limit) limits.push_back(*limit);
  }
  if (limits.empty()) {
    throw std::runtime_error("how much host memory is free cannot be told: " + root +
                             "/proc/meminfo has no MemTotal and MemAvailable that can be read, and "
                             "no control group in " +
                             root + "/proc/self/cgroup has a limit that can");
  }
  std::stable_sort(limits.begin(), limits.end(), [](const MemoryLimit& a, const MemoryLimit& b) {
    return a.available < b.available;
  });
  return limits;
}

const MemoryLimit& least_total(const std::vector<MemoryLimit>& limits) {
  return *std::min_element(limits.begin(), limits.end(),
                           [](const auto& a, const auto& b) { return a.total < b.total; });
}

HostMemory host_memory(const std::set<int>& hbm_nodes, const std::string& root,
                       const std::optional<std::set<int>>& bound) {
  const auto limits = host_limits(hbm_nodes, root, bound);
  const MemoryLimit& tightest = limits.front();
  const Bytes total = least_total(limits).total;
  return {total, std::min(tightest.available, total), tightest.name};
}

// NVIDIA's nvgrace-egm driver has one device per socket, /sys/class/egm/egm<proximity domain>, with
// the bytes in `egm_size`, printed as "0x%lx\n" ("vfio/nvgrace-egm: Expose EGM size through sysfs",
// [PATCH RFC v2 00/15] "Add virtualization support for EGM", lore.kernel.org/kvm,
// 20260223155514.152435-1-ankita@nvidia.com). It was not yet merged then, and its review asked for
// decimal, so both are read. Read off the patches, not tried on such a machine.
std::optional<Bytes> egm_carveout(const std::string& root) {
  std::optional<Bytes> sum;
  for (const auto& [number, folder] : numbered_entries(root + "/sys/class/egm", "egm")) {
    const auto size = read_size(folder + "/egm_size");
    if (size) sum = saturated_sum(sum.value_or(Bytes(0)), *size);
  }
  return sum;
}

}  // namespace egm
