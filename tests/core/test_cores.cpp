// How many cores the CPU quotas of control groups of both versions leave, each faked in a folder.
#include <optional>
#include <string>

#include "checks.h"
#include "core/cores.h"
#include "fake_root.h"

namespace {

using namespace egm;

void expect_quota(const std::string& what, const FakeRoot& root, std::optional<uint64_t> cores) {
  const auto got = quota_cores(root.path());
  expect(got == cores, what + ", not " + (got ? std::to_string(*got) : "none"));
}

void write_version_2(FakeRoot& root) {
  root.write("/proc/self/mountinfo", "30 23 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n");
  root.write("/proc/self/cgroup", "0::/slice/job\n");
  std::filesystem::create_directories(root.path() + "/sys/fs/cgroup/slice/job");
}

FakeRoot& old_quota(FakeRoot& root, const std::string& folder, const std::string& quota,
                    const std::string& period) {
  return root.write(folder + "/cpu.cfs_quota_us", quota + "\n")
      .write(folder + "/cpu.cfs_period_us", period + "\n");
}

void no_quota_bounds_nothing() {
  FakeRoot root;
  expect_quota("no groups", root, std::nullopt);
  write_version_2(root);
  expect_quota("no files, as in the root group", root, std::nullopt);
  root.write("/sys/fs/cgroup/slice/cpu.max", "max 100000\n");
  root.write("/sys/fs/cgroup/slice/job/cpu.max", "max 100000\n");
  expect_quota("none set", root, std::nullopt);
}

void quotas_of_all_enclosing_groups_count() {
  FakeRoot root;
  write_version_2(root);
  root.write("/sys/fs/cgroup/slice/other/cpu.max", "100000 100000\n");
  root.write("/sys/fs/cgroup/slice/job/cpu.max", "800000 100000\n");
  expect_quota("the own group's", root, 8);
  root.write("/sys/fs/cgroup/slice/cpu.max", "300000 100000\n");
  expect_quota("a tighter parent's", root, 3);
  root.write("/sys/fs/cgroup/slice/cpu.max", "800000 50000\n");
  expect_quota("a looser parent's", root, 8);
  root.write("/sys/fs/cgroup/slice/job/cpu.max", "max 100000\n");
  expect_quota("the parent's alone", root, 16);
  // A container has a namespace of its own, in which its group is the root.
  root.write("/proc/self/cgroup", "0::/\n");
  root.write("/sys/fs/cgroup/cpu.max", "200000 100000\n");
  expect_quota("at the mount", root, 2);
}

void version_1_quotas_count() {
  FakeRoot root;
  root.write("/proc/self/cgroup", "9:name=systemd:/\n4:memory:/m\n3:cpu,cpuacct:/jobs/one\n0::/\n");
  root.write("/proc/self/mountinfo",
             "33 31 0:32 / /mnt/mem rw - cgroup cgroup rw,memory\n"
             "34 31 0:33 / /mnt/cpu rw - cgroup cgroup rw,cpu,cpuacct\n"
             "41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n");
  old_quota(root, "/mnt/cpu", "-1", "100000");
  old_quota(root, "/mnt/cpu/jobs", "-1", "100000");
  old_quota(root, "/mnt/cpu/jobs/one", "-1", "100000");
  expect_quota("version 1, none set", root, std::nullopt);
  old_quota(root, "/mnt/cpu/jobs/one", "600000", "100000");
  expect_quota("version 1, the own group's", root, 6);
  old_quota(root, "/mnt/cpu/jobs", "200000", "50000");
  expect_quota("version 1, a tighter parent's", root, 4);
  root.write("/proc/self/mountinfo", "");
  old_quota(root, "/sys/fs/cgroup/cpu/jobs/one", "500000", "100000");
  expect_quota("version 1, at the usual place", root, 5);
}

void fractions_are_rounded_down_to_at_least_one() {
  FakeRoot root;
  write_version_2(root);
  const auto expect_cores = [&root](const std::string& quota, uint64_t cores) {
    root.write("/sys/fs/cgroup/slice/job/cpu.max", quota + "\n");
    expect_quota(quota, root, cores);
  };
  expect_cores("150000 100000", 1);
  expect_cores("299999 100000", 2);
  expect_cores("300000 100000", 3);
  expect_cores("1000 100000", 1);
  expect_cores("18446744073709551615 1", 18446744073709551615ULL);
  FakeRoot old;
  old.write("/proc/self/cgroup", "3:cpu:/\n");
  old_quota(old, "/sys/fs/cgroup/cpu", "50000", "100000");
  expect_quota("version 1, half a core", old, 1);
  old_quota(old, "/sys/fs/cgroup/cpu", "250000", "100000");
  expect_quota("version 1, two and a half", old, 2);
}

void what_cannot_be_read_is_skipped() {
  FakeRoot root;
  write_version_2(root);
  root.write("/sys/fs/cgroup/slice/cpu.max", "700000 100000\n");
  for (const char* junk : {"", "\n", "x", "100000", "100000 0", "100000 x", "-1 100000",
                           "1e5 100000", "100000 100000 1", "99999999999999999999 100000"}) {
    root.write("/sys/fs/cgroup/slice/job/cpu.max", junk);
    expect_quota("junk quota " + std::string(junk), root, 7);
  }
  std::filesystem::remove(root.path() + "/sys/fs/cgroup/slice/job/cpu.max");
  std::filesystem::create_directories(root.path() + "/sys/fs/cgroup/slice/job/cpu.max");
  expect_quota("a folder", root, 7);
  FakeRoot old;
  old.write("/proc/self/cgroup", "3:cpu:/\n");
  for (const char* junk : {"", "x", "0"}) {
    old_quota(old, "/sys/fs/cgroup/cpu", "100000", junk);
    expect_quota("version 1, junk period " + std::string(junk), old, std::nullopt);
    old_quota(old, "/sys/fs/cgroup/cpu", junk, junk);
    expect_quota("version 1, junk " + std::string(junk), old, std::nullopt);
  }
}

void usable_are_the_cores_of_the_affinity_within_the_quota() {
  FakeRoot root;
  write_version_2(root);
  const unsigned all = usable_cores(root.path());
  expect(all >= 1, "at least one core");
  root.write("/sys/fs/cgroup/slice/cpu.max", "100000 100000\n");
  expect(usable_cores(root.path()) == 1, "a quota of one core");
  root.write("/sys/fs/cgroup/slice/cpu.max", "18446744073709551615 1\n");
  expect(usable_cores(root.path()) == all, "a quota of more than there are");
  expect(usable_cores() >= 1 && usable_cores() <= all, "on this machine");
}

}  // namespace

int main() {
  no_quota_bounds_nothing();
  quotas_of_all_enclosing_groups_count();
  version_1_quotas_count();
  fractions_are_rounded_down_to_at_least_one();
  what_cannot_be_read_is_skipped();
  usable_are_the_cores_of_the_affinity_within_the_quota();
  return exit_status();
}
