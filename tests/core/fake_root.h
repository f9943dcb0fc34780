// A folder with a /proc and a /sys as some machine would have them, written by a test.
#pragma once

#include <stdlib.h>

#include <filesystem>
#include <fstream>
#include <stdexcept>
#include <string>

class FakeRoot {
 public:
  FakeRoot() {
    std::string name = (std::filesystem::temp_directory_path() / "egm_root_XXXXXX").string();
    if (!mkdtemp(name.data())) throw std::runtime_error("no temporary folder");
    path_ = name;
  }
  ~FakeRoot() { std::filesystem::remove_all(path_); }
  FakeRoot(const FakeRoot&) = delete;
  FakeRoot& operator=(const FakeRoot&) = delete;

  const std::string& path() const { return path_; }

  FakeRoot& write(const std::string& file, const std::string& text) {
    std::filesystem::create_directories(std::filesystem::path(path_ + file).parent_path());
    std::ofstream(path_ + file) << text;
    return *this;
  }

  FakeRoot& meminfo(uint64_t total_mib, uint64_t available_mib) {
    return write("/proc/meminfo", "MemTotal:       " + kib(total_mib) + "MemFree:  " + kib(1) +
                                      "MemAvailable:   " + kib(available_mib));
  }

  struct Node {
    uint64_t total = 0, free = 0, active = 0, inactive = 0, slabs = 0, shared = 0;  // MiB
  };

  FakeRoot& node(int number, const Node& node) {
    const std::string name = "Node " + std::to_string(number) + " ";
    return write("/sys/devices/system/node/node" + std::to_string(number) + "/meminfo",
                 name + "MemTotal:       " + kib(node.total) + name + "MemFree:  " +
                     kib(node.free) + name + "Active(file):  " + kib(node.active) + name +
                     "Inactive(file):  " + kib(node.inactive) + name + "Active(anon):  " + kib(7) +
                     name + "FilePages:  " + kib(node.active + node.inactive + node.shared) + name +
                     "KReclaimable:  " + kib(node.slabs) + name +
                     "SReclaimable:  " + kib(node.slabs) + name + "HugePages_Total:     0\n");
  }

  // A group of version 2, in MiB; `limit` and `high` as the file has them.
  FakeRoot& group(const std::string& folder, const std::string& limit, const std::string& high,
                  uint64_t current, uint64_t inactive_file) {
    write(folder + "/memory.max", limit + "\n");
    write(folder + "/memory.high", high + "\n");
    write(folder + "/memory.current", bytes(current) + "\n");
    return write(folder + "/memory.stat",
                 "anon 4096\ninactive_file " + bytes(inactive_file) + "\nactive_file 8192\n");
  }

  // A group of version 1, in MiB.
  FakeRoot& old_group(const std::string& folder, const std::string& limit, uint64_t usage,
                      uint64_t inactive_file) {
    write(folder + "/memory.limit_in_bytes", limit + "\n");
    write(folder + "/memory.usage_in_bytes", bytes(usage) + "\n");
    return write(folder + "/memory.stat",
                 "inactive_file 1\ntotal_inactive_file " + bytes(inactive_file) + "\n");
  }

  static std::string bytes(uint64_t mib) { return std::to_string(mib << 20); }

 private:
  std::string path_;

  static std::string kib(uint64_t mib) { return std::to_string(mib << 10) + " kB\n"; }
};
