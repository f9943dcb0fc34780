// Which NUMA node each page is on: move_pages(2) without target nodes moves nothing and reports.
#include "core/page_nodes.h"

#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <system_error>
#include <vector>

namespace egm {

PageNodes page_nodes(const void* address, Bytes size) {
  // Pages asked about per call; arbitrary.
  constexpr size_t kBatch = 1 << 15;
  const auto page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const auto begin = reinterpret_cast<uintptr_t>(address) / page * page;
  const auto end = reinterpret_cast<uintptr_t>(address) + size.count();
  PageNodes result;
  std::vector<const void*> pages;
  std::vector<int> nodes;
  for (uintptr_t at = begin; at < end;) {
    pages.clear();
    for (; at < end && pages.size() < kBatch; at += page) {
      pages.push_back(reinterpret_cast<const void*>(at));
    }
    nodes.assign(pages.size(), -EFAULT);
    if (syscall(SYS_move_pages, 0, pages.size(), pages.data(), nullptr, nodes.data(), 0) < 0) {
      throw std::system_error(errno, std::generic_category(),
                              "the kernel does not say where pages are (move_pages; a container "
                              "may need --cap-add SYS_NICE)");
    }
    for (const int node : nodes) {
      Bytes& bytes = node >= 0 ? result.by_node[node] : result.unmapped;
      bytes = bytes + Bytes(page);
    }
  }
  return result;
}

Bytes estimate_off_host(const void* address, Bytes size, int hbm_node) noexcept {
  constexpr size_t kSamples = 256;
  const auto page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const auto begin = reinterpret_cast<uintptr_t>(address) / page * page;
  const uint64_t step = std::max<uint64_t>(page, size.count() / kSamples / page * page);
  const void* pages[kSamples];
  int nodes[kSamples];
  size_t count = 0;
  for (uint64_t offset = 0; offset < size.count() && count < kSamples; offset += step) {
    nodes[count] = -EFAULT;
    pages[count++] = reinterpret_cast<const void*>(begin + offset);
  }
  if (count == 0) return Bytes(0);
  if (syscall(SYS_move_pages, 0, count, pages, nullptr, nodes, 0) < 0) return size;
  const auto off_host = static_cast<size_t>(std::count_if(
      nodes, nodes + count, [hbm_node](int node) { return node < 0 || node == hbm_node; }));
  return Bytes(size.count() / count * off_host);
}

}  // namespace egm
