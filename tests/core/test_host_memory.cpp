// What is read of host memory from machines of all kinds, each faked in a folder.
#include <set>
#include <stdexcept>
#include <string>

#include "checks.h"
#include "core/host_memory.h"
#include "core/kernel_files.h"
#include "fake_root.h"

namespace {

using namespace egm;

constexpr const char* kV2 =
    "30 23 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n";
constexpr const char* kNoV1Limit = "9223372036854771712";

void expect_memory(const std::string& what, const FakeRoot& root, Bytes total, Bytes available,
                   const std::string& limited_by, const std::set<int>& hbm_nodes = {}) {
  const auto memory = host_memory(hbm_nodes, root.path());
  const auto in_mib = [](Bytes size) { return std::to_string(size.count() / (1 << 20)); };
  expect(memory.total == total, what + ": total, not " + in_mib(memory.total));
  expect(memory.available == available, what + ": available, not " + in_mib(memory.available));
  expect(memory.limited_by == limited_by, what + ": limited by " + memory.limited_by);
}

std::string message_of(const FakeRoot& root) {
  try {
    host_memory({}, root.path());
  } catch (const std::runtime_error& error) {
    return error.what();
  }
  return "";
}

void plain_hosts_are_what_meminfo_says() {
  FakeRoot root;
  root.meminfo(1000, 600);
  expect_memory("no NUMA, no groups", root, mib(1000), mib(600), "MemAvailable");
  root.node(0, {1000, 100, 50, 50, 10, 0});
  root.write("/proc/self/status", "Name:\tx\nMems_allowed:\t1\nMems_allowed_list:\t0\n");
  expect_memory("one node", root, mib(1000), mib(600), "MemAvailable");
  root.meminfo(1000, 1100);
  expect_memory("never more than there is", root, mib(1000), mib(1000), "MemAvailable");
}

void gpu_memory_does_not_count() {
  FakeRoot root;
  root.meminfo(1500, 900);
  root.node(0, {1000, 500, 1, 1, 1, 0});
  root.node(8, {500, 200, 30, 20, 10, 60});  // shared memory is not in MemAvailable
  expect_memory("HBM node", root, mib(1000), mib(640),
                "MemAvailable without NUMA node 8 (GPU memory)", {8});
  expect_memory("HBM node that is not there", root, mib(1500), mib(900), "MemAvailable", {9});
  root.node(9, {400, 5000, 0, 0, 0, 0});
  expect_memory("never below nothing, never more than the node has", root, mib(600), mib(240),
                "MemAvailable without NUMA nodes 8,9 (GPU memory)", {8, 9});
  root.meminfo(1500, 259);
  expect_memory("less than nothing is nothing", root, mib(1000), mib(0),
                "MemAvailable without NUMA node 8 (GPU memory)", {8});
  root.meminfo(1500, 900);
  root.write("/sys/devices/system/node/node8/meminfo", "Node 8 MemTotal: lots\n");
  root.node(9, {400, 100, 0, 0, 0, 0});
  expect_memory("unreadable HBM node: the others are added up", root, mib(1400), mib(601),
                "NUMA nodes 0,9 (the others are GPU memory)", {8});
}

void old_kernels_name_slabs_otherwise() {
  FakeRoot root;
  root.meminfo(1000, 900);
  root.write("/sys/devices/system/node/node1/meminfo",
             "Node 1 MemTotal: 204800 kB\nNode 1 MemFree: 102400 kB\n"
             "Node 1 SReclaimable: 10240 kB\n");
  expect_memory("SReclaimable", root, mib(800), mib(790),
                "MemAvailable without NUMA node 1 (GPU memory)", {1});
}

void cpusets_restrict_to_their_nodes() {
  FakeRoot root;
  root.meminfo(4000, 3000);
  root.node(0, {1000, 300, 40, 20, 9, 0});
  root.node(2, {1000, 500, 0, 30, 0, 0});
  root.node(5, {2000, 1900, 0, 0, 0, 0});
  const auto allow = [&root](const std::string& list) {
    root.write("/proc/self/status", "Name:\tx\nMems_allowed_list:\t" + list + "\nThreads:\t1\n");
  };
  allow("0-3");
  expect_memory("range with a hole", root, mib(2000), mib(850), "NUMA nodes 0,2 (cpuset)");
  allow("2");
  expect_memory("one of three", root, mib(1000), mib(530), "NUMA node 2 (cpuset)");
  allow("0,2,5-1023");
  expect_memory("all of them", root, mib(4000), mib(3000), "MemAvailable");
  allow("0-2");
  expect_memory("all but GPU memory", root, mib(2000), mib(1100),
                "MemAvailable without NUMA node 5 (GPU memory)", {5});
  allow("2,5");
  expect_memory("GPU memory in the cpuset", root, mib(1000), mib(530), "NUMA node 2 (cpuset)", {5});
  root.node(7, {});
  allow("0,2,5");
  expect_memory("a node without memory is no restriction", root, mib(4000), mib(3000),
                "MemAvailable");
  allow("5");
  root.meminfo(4000, 1200);
  expect_memory("the least limit counts", root, mib(2000), mib(1200), "MemAvailable");
  for (const char* junk : {"", "x", "1-", "-", "3-1", "0-1-2", "0,,2", "99999999999999999999"}) {
    allow(junk);
    expect_memory(std::string("junk list ") + junk, root, mib(4000), mib(1200), "MemAvailable");
  }
  allow("2");
  root.write("/sys/devices/system/node/node2/meminfo", "Node 2 MemTotal: 1024 kB\n");
  expect_memory("unreadable node", root, mib(4000), mib(1200), "MemAvailable");
}

void limits_of_all_enclosing_groups_count() {
  FakeRoot root;
  root.meminfo(4000, 3000);
  root.write("/proc/self/mountinfo", kV2);
  root.write("/proc/self/cgroup", "1:name=systemd:/other\n0::/slice/job\n");
  root.group("/sys/fs/cgroup/slice/job", "max", "max", 100, 0);
  root.group("/sys/fs/cgroup/slice", "max", "max", 900, 0);
  expect_memory("no limit set", root, mib(4000), mib(3000), "MemAvailable");
  root.group("/sys/fs/cgroup/slice/job", FakeRoot::bytes(2000), "max", 300, 50);
  expect_memory("own limit", root, mib(2000), mib(1750), "cgroup limit of /slice/job (memory.max)");
  root.group("/sys/fs/cgroup/slice", FakeRoot::bytes(1500), "max", 900, 100);
  expect_memory("the parent's", root, mib(1500), mib(700), "cgroup limit of /slice (memory.max)");
  root.group("/sys/fs/cgroup/slice/job", FakeRoot::bytes(2000), FakeRoot::bytes(400), 300, 50);
  expect_memory("memory.high", root, mib(400), mib(150),
                "cgroup limit of /slice/job (memory.high)");
  root.group("/sys/fs/cgroup/slice/job", FakeRoot::bytes(200), "max", 300, 50);
  expect_memory("beyond its limit", root, mib(200), mib(0),
                "cgroup limit of /slice/job (memory.max)");
  root.group("/sys/fs/cgroup/slice/job", FakeRoot::bytes(200), "max", 30, 5000);
  expect_memory("more cache than use", root, mib(200), mib(200),
                "cgroup limit of /slice/job (memory.max)");
}

// Of the limits that `root` has, the group of the one called `name`.
uint64_t group_of(const FakeRoot& root, const std::string& name) {
  for (const auto& limit : host_limits({}, root.path())) {
    if (limit.name.find(name) != std::string::npos) return limit.group;
  }
  expect(false, "no limit is called " + name);
  return 0;
}

void limits_say_whom_they_hold_for() {
  FakeRoot root;
  root.meminfo(4000, 3000);
  root.write("/proc/self/mountinfo", kV2).write("/proc/self/cgroup", "0::/slice/job\n");
  root.group("/sys/fs/cgroup/slice", FakeRoot::bytes(900), "max", 100, 0);
  root.group("/sys/fs/cgroup/slice/job", FakeRoot::bytes(700), FakeRoot::bytes(600), 100, 0);
  root.group("/sys/fs/cgroup/slice/other", FakeRoot::bytes(500), "max", 100, 0);
  const auto limits = host_limits({}, root.path());
  expect(limits.size() == 4 && limits[0].available == mib(500) && limits[1].available == mib(600) &&
             limits[2].available == mib(800) && limits[3].available == mib(3000),
         "the tightest first");
  const auto slice = group_of(root, "/slice (memory.max)");
  const auto job = group_of(root, "/slice/job (memory.max)");
  expect(group_of(root, "MemAvailable") == 0, "the host's holds for all");
  expect(slice != 0 && job != 0 && slice != job, "each group has its own");
  expect(group_of(root, "/slice/job (memory.high)") == job, "for both of its limits");
  root.write("/proc/self/cgroup", "0::/slice/other\n");
  expect(group_of(root, "/slice (memory.max)") == slice, "the same for all within");
  // As a container sees it that has only its own group.
  std::filesystem::create_directories(root.path() + "/mnt");
  std::filesystem::create_directory_symlink(root.path() + "/sys/fs/cgroup/slice/job",
                                            root.path() + "/mnt/job");
  root.write("/proc/self/mountinfo", "30 23 0:26 / /mnt/job ro - cgroup2 cgroup rw\n");
  root.write("/proc/self/cgroup", "0::/\n");
  expect(group_of(root, "cgroup limit of / (memory.max)") == job, "by whatever path");
}

void cpusets_hold_for_those_on_the_same_nodes() {
  FakeRoot root;
  root.meminfo(4000, 3000);
  for (const int number : {0, 1, 2}) root.node(number, {1000, 500, 0, 0, 0, 0});
  const auto group_on = [&](const std::string& list) {
    root.write("/proc/self/status", "Mems_allowed_list:\t" + list + "\n");
    return group_of(root, "(cpuset)");
  };
  const auto group = group_on("0-1");
  expect(group != 0 && group == group_on("0,1") && group != group_on("1-2"), "by the nodes");
}

void groups_are_found_without_mountinfo_and_by_escaped_names() {
  FakeRoot root;
  root.meminfo(4000, 3000).write("/proc/self/cgroup", "0::/a:b\n");
  root.group("/sys/fs/cgroup/a:b", FakeRoot::bytes(500), "max", 0, 0);
  expect_memory("usual place", root, mib(500), mib(500), "cgroup limit of /a:b (memory.max)");
  root.write("/proc/self/mountinfo", "1 2 0:3 / /my\\040groups rw - cgroup2 none rw\n");
  root.group("/my groups/a:b", FakeRoot::bytes(400), "max", 0, 0);
  expect_memory("escaped", root, mib(400), mib(400), "cgroup limit of /a:b (memory.max)");
}

void version_1_limits_count() {
  FakeRoot root;
  root.meminfo(4000, 3000);
  root.write("/proc/self/cgroup", "9:name=systemd:/\n4:cpu,memory:/jobs/one\n0::/\n");
  root.write("/proc/self/mountinfo",
             "34 31 0:33 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n"
             "35 31 0:32 / /mnt/mem rw - cgroup cgroup rw,memory\n"
             "41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n");
  std::filesystem::create_directories(root.path() + "/sys/fs/cgroup/cpu/jobs/one");
  root.old_group("/mnt/mem", kNoV1Limit, 2000, 0);
  root.old_group("/mnt/mem/jobs", FakeRoot::bytes(900), 600, 100);
  root.old_group("/mnt/mem/jobs/one", FakeRoot::bytes(800), 100, 20);
  expect_memory("nested", root, mib(800), mib(400),
                "cgroup limit of /jobs (memory.limit_in_bytes)");
  root.write("/proc/self/mountinfo", "");
  expect_memory("not at the usual place", root, mib(4000), mib(3000), "MemAvailable");
  root.old_group("/sys/fs/cgroup/memory/jobs/one", FakeRoot::bytes(300), 100, 20);
  expect_memory("at the usual place", root, mib(300), mib(220),
                "cgroup limit of /jobs/one (memory.limit_in_bytes)");
}

void containers_see_their_group_at_the_mount() {
  FakeRoot root;
  root.meminfo(4000, 3000);
  root.group("/sys/fs/cgroup", FakeRoot::bytes(700), "max", 100, 0);
  root.group("/sys/fs/other", FakeRoot::bytes(60), "max", 0, 0);
  const std::string tail = " /sys/fs/cgroup ro - cgroup2 cgroup rw\n";
  root.write("/proc/self/mountinfo", "30 23 0:26 /" + tail);
  for (const char* path : {"/", "/docker/abc", "/../other", "/gone (deleted)"}) {
    root.write("/proc/self/cgroup", "0::" + std::string(path) + "\n");
    expect_memory(path, root, mib(700), mib(600), "cgroup limit of / (memory.max)");
  }
  root.write("/proc/self/mountinfo", "30 23 0:26 /docker/abc" + tail);
  root.write("/proc/self/cgroup", "0::/docker/abc\n");
  expect_memory("mount of the group", root, mib(700), mib(600),
                "cgroup limit of /docker/abc (memory.max)");
  root.write("/proc/self/cgroup", "0::/docker/abc/inner\n");
  root.group("/sys/fs/cgroup/inner", FakeRoot::bytes(50), "max", 0, 0);
  expect_memory("below it", root, mib(50), mib(50),
                "cgroup limit of /docker/abc/inner (memory.max)");
  root.write("/proc/self/cgroup", "0::/docker/abcinner\n");
  root.group("/sys/fs/cgroupinner", FakeRoot::bytes(40), "max", 0, 0);
  expect_memory("another whose name begins alike", root, mib(700), mib(600),
                "cgroup limit of /docker/abc (memory.max)");
  root.write("/proc/self/cgroup", "0::/docker/abc/inner\n");
  for (const char* hidden : {"/docker/xyz", "/docker/abc", "/"}) {
    root.write("/proc/self/mountinfo", "29 23 0:26 " + std::string(hidden) +
                                           " /other ro - cgroup2 cgroup rw\n"
                                           "30 23 0:26 /docker/abc" +
                                           tail);
    expect_memory("the mount where it is visible", root, mib(50), mib(50),
                  "cgroup limit of /docker/abc/inner (memory.max)");
  }
}

void what_cannot_be_read_is_skipped() {
  FakeRoot root;
  expect(message_of(root).find(root.path() + "/proc/meminfo") != std::string::npos,
         "names the file");
  root.write("/proc/self/cgroup", "4:memory:/\n");
  root.old_group("/sys/fs/cgroup/memory", kNoV1Limit, 1, 0);
  expect(!message_of(root).empty(), "no limit at all");
  root.write("/proc/self/cgroup", "0::/job\n").write("/proc/self/mountinfo", kV2);
  root.group("/sys/fs/cgroup/job", FakeRoot::bytes(700), "max", 100, 0);
  expect_memory("a group alone", root, mib(700), mib(600), "cgroup limit of /job (memory.max)");
  root.meminfo(4000, 3000);
  const auto skipped = [&root](const std::string& what) {
    expect_memory(what, root, mib(4000), mib(3000), "MemAvailable");
  };
  for (const char* junk : {"", "\n", "x", "-1", "12x", "0x", "1.5", "99999999999999999999"}) {
    root.group("/sys/fs/cgroup/job", junk, junk, 100, 0);
    skipped(std::string("junk limit ") + junk);
  }
  root.group("/sys/fs/cgroup/job", FakeRoot::bytes(700), "max", 100, 0);
  std::filesystem::remove(root.path() + "/sys/fs/cgroup/job/memory.stat");
  expect_memory("no memory.stat", root, mib(700), mib(600), "cgroup limit of /job (memory.max)");
  root.write("/sys/fs/cgroup/job/memory.stat", "inactive_file\ninactive_file x\n\n junk\n");
  expect_memory("junk memory.stat", root, mib(700), mib(600), "cgroup limit of /job (memory.max)");
  std::filesystem::remove(root.path() + "/sys/fs/cgroup/job/memory.current");
  skipped("no memory.current");
  std::filesystem::create_directories(root.path() + "/sys/fs/cgroup/job/memory.current");
  skipped("a folder for a file");
  for (const char* junk : {"0:", ":", "0::", "::", "1:memory", "0::relative", "\n\n"}) {
    root.write("/proc/self/cgroup", junk);
    skipped(std::string("junk /proc/self/cgroup ") + junk);
  }
  root.write("/proc/self/cgroup", "0::/job\n");
  for (const char* junk : {"-", "- cgroup2 a b", "1 2 3 / /x - cgroup2", "1 2 3 4 5 6 7 8 9"}) {
    root.write("/proc/self/mountinfo", junk);
    skipped(std::string("junk mountinfo ") + junk);
  }
  for (const char* name : {"node", "nodex", "node1x", "abcd1", "node4294967297", "1"}) {
    root.write("/sys/devices/system/node/" + std::string(name) + "/meminfo",
               "Node 1 MemTotal: 1024 kB\nNode 1 MemFree: 1024 kB\n");
  }
  root.write("/sys/devices/system/node/has_cpu", "0\n");
  expect_memory("names that are no nodes", root, mib(4000), mib(3000), "MemAvailable", {1});
  root.write("/proc/meminfo", "MemTotal: 18446744073709551615 kB\nMemAvailable: 5 kB\n");
  expect(!message_of(root).empty(), "a size beyond 64 bits is no size");
}

void carve_outs_are_added_up() {
  FakeRoot root;
  expect(!egm_carveout(root.path()), "no class of devices");
  root.write("/sys/class/egm/egm4/dev", "511:4\n");
  expect(!egm_carveout(root.path()), "a device that does not say");
  root.write("/sys/class/egm/egm4/egm_size", "0x6fc0000000\n");
  expect(egm_carveout(root.path()) == Bytes(0x6fc0000000), "one socket");
  root.write("/sys/class/egm/egm5/egm_size", "4096\n");
  root.write("/sys/class/egm/egm6/egm_size", "0xhello\n");
  root.write("/sys/class/egm/gpu7/egm_size", "4096\n");
  expect(egm_carveout(root.path()) == Bytes(0x6fc0001000), "decimal too, junk not");
}

void this_machine_has_memory() {
  const auto memory = host_memory({});
  expect(memory.available > Bytes(0), "some is available");
  expect(memory.available <= memory.total, "not more than there is");
  expect(!memory.limited_by.empty(), "something limits it");
  const auto total = size_at(read_sizes("/proc/meminfo"), "MemTotal");
  expect(total && memory.total <= *total, "not more than the machine has");
}

}  // namespace

int main() {
  plain_hosts_are_what_meminfo_says();
  gpu_memory_does_not_count();
  old_kernels_name_slabs_otherwise();
  cpusets_restrict_to_their_nodes();
  limits_of_all_enclosing_groups_count();
  limits_say_whom_they_hold_for();
  cpusets_hold_for_those_on_the_same_nodes();
  groups_are_found_without_mountinfo_and_by_escaped_names();
  version_1_limits_count();
  containers_see_their_group_at_the_mount();
  what_cannot_be_read_is_skipped();
  carve_outs_are_added_up();
  this_machine_has_memory();
  return exit_status();
}
