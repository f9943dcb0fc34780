// Host memory under a thread's memory policy.
#include <sys/syscall.h>
#include <unistd.h>

#include <optional>
#include <set>
#include <string>
#include <thread>

#include "checks.h"
#include "core/host_memory.h"
#include "core/host_range.h"
#include "core/memory_policy.h"
#include "fake_root.h"

namespace {

using namespace egm;

using NodeSet = std::set<int>;

void bindings_restrict_to_their_nodes() {
  FakeRoot root;
  root.meminfo(4000, 3000);
  root.node(0, {1000, 300, 40, 20, 9, 0});
  root.node(2, {1000, 500, 0, 30, 0, 0});
  root.node(5, {2000, 1900, 0, 0, 0, 0});
  const auto expect_limit = [&root](const std::string& what, const NodeSet& hbm_nodes,
                                    const NodeSet& bound, Bytes available,
                                    const std::string& limited_by) {
    const auto memory = host_memory(hbm_nodes, root.path(), bound);
    expect(memory.available == available, what + ": available");
    expect(memory.limited_by == limited_by, what + ": limited by " + memory.limited_by);
  };
  const std::string on_2 = "NUMA node 2 (memory policy)";
  expect_limit("one of three", {}, {2}, mib(530), on_2);
  expect_limit("all of them", {}, {0, 2, 5}, mib(3000), "MemAvailable");
  expect_limit("GPU memory among them", {5}, {2, 5}, mib(530), on_2);
  root.write("/proc/self/status", "Mems_allowed_list:\t0,2\n");
  expect_limit("within a cpuset", {}, {2}, mib(530), on_2);
  expect(host_memory({}, root.path(), std::nullopt).limited_by == "NUMA nodes 0,2 (cpuset)",
         "no binding");
}

void binding_is_that_of_the_thread_that_asks() {
  constexpr int kDefault = 0;
  constexpr int kBind = 2;
  const unsigned long node_0 = 1;
  expect(!bound_nodes(), "none to begin with");
  // A container may forbid it.
  if (syscall(SYS_set_mempolicy, kBind, &node_0, 64) != 0) return;
  const auto here = bound_nodes();
  const bool preferred = HostRange(mib(2)).prefer_node(0);
  std::optional<NodeSet> elsewhere{{7}};
  std::thread([&] {
    syscall(SYS_set_mempolicy, kDefault, nullptr, 0);
    elsewhere = bound_nodes();
  }).join();
  syscall(SYS_set_mempolicy, kDefault, nullptr, 0);
  expect(here == NodeSet{0}, "the nodes it is bound to");
  expect(!preferred, "what is bound is not bound anew");
  expect(!elsewhere, "another thread has its own");
  expect(!bound_nodes(), "and none afterwards");
}

}  // namespace

int main() {
  bindings_restrict_to_their_nodes();
  binding_is_that_of_the_thread_that_asks();
  return exit_status();
}
