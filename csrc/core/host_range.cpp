// Huge pages by mmap and madvise, brought up by several threads.
#include "core/host_range.h"

#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstdint>
#include <system_error>
#include <thread>
#include <vector>

#include "core/cores.h"
#include "core/kernel_files.h"
#include "core/memory_policy.h"

namespace egm {
namespace {

#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23  // Linux 5.14; older C libraries do not name it
#endif

Bytes page_size() { return Bytes(static_cast<uint64_t>(sysconf(_SC_PAGESIZE))); }

// Backs a part of the range; 0 or an errno. A kernel without MADV_POPULATE_WRITE has its pages
// touched one by one.
int populate_part(char* at, size_t size) {
  for (;;) {
    if (madvise(at, size, MADV_POPULATE_WRITE) == 0) return 0;
    if (errno == EINTR || errno == EAGAIN) continue;
    if (errno != EINVAL) return errno;
    const size_t page = page_size().count();
    for (size_t offset = 0; offset < size; offset += page) {
      *static_cast<volatile char*>(at + offset) = 0;
    }
    return 0;
  }
}

}  // namespace

PageSizes page_sizes(const std::string& root) {
  const Bytes page = page_size();
  const auto huge = read_size(root + "/sys/kernel/mm/transparent_hugepage/hpage_pmd_size");
  return {page, std::max(page, huge.value_or(page))};
}

HostRange::HostRange(Bytes size) : size_(round_up(size, page_size())) {
  const uint64_t alignment = alignment_for(size_, page_sizes()).count();
  const uint64_t room = size_.count() + alignment;
  void* const got = mmap(nullptr, room, PROT_READ | PROT_WRITE,
                         MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (got == MAP_FAILED) throw std::system_error(errno, std::generic_category(), "mmap");
  const auto start = reinterpret_cast<uintptr_t>(got);
  const uintptr_t base = round_up(start, alignment);
  if (base > start) munmap(got, base - start);
  const uintptr_t end = base + size_.count();
  if (start + room > end) munmap(reinterpret_cast<void*>(end), start + room - end);
  base_ = reinterpret_cast<void*>(base);
  // A kernel without huge pages refuses, and the range has ordinary ones.
  madvise(base_, size_.count(), MADV_HUGEPAGE);
  // A child of fork() would otherwise get a copy of what it writes to, or the parent would.
  madvise(base_, size_.count(), MADV_DONTFORK);
}

HostRange::~HostRange() {
  if (base_ != nullptr) free_host_range(base_, size_);
}

bool HostRange::prefer_node(int node) noexcept {
  constexpr int kPreferred = 1;  // MPOL_PREFERRED: unlike MPOL_BIND it kills nobody when full
  constexpr size_t kBits = 8 * sizeof(unsigned long);
  constexpr size_t kNodes = 1024;
  if (node < 0 || static_cast<size_t>(node) >= kNodes) return false;
  // What the user has bound counts more than nearness.
  if (bound_nodes()) return false;
  unsigned long mask[kNodes / kBits] = {};
  mask[static_cast<size_t>(node) / kBits] |= 1UL << (static_cast<size_t>(node) % kBits);
  return syscall(SYS_mbind, base_, size_.count(), kPreferred, mask, kNodes, 0) == 0;
}

void HostRange::populate() {
  const auto parts = parts_for(size_, page_sizes());
  std::atomic<size_t> next{0};
  std::atomic<int> problem{0};
  const auto work = [&] {
    for (size_t index = next++; index < parts.size() && problem == 0; index = next++) {
      const auto [offset, size] = parts[index];
      const int error = populate_part(static_cast<char*>(base_) + offset.count(), size.count());
      if (error != 0) problem = error;
    }
  };
  std::vector<std::thread> threads;
  try {
    const size_t wanted = std::min<size_t>(usable_cores(), parts.size());
    while (threads.size() + 1 < wanted) threads.emplace_back(work);
  } catch (const std::system_error&) {
    // Too many threads here already: fewer do it too.
  }
  work();
  for (std::thread& thread : threads) thread.join();
  if (problem != 0) {
    throw std::system_error(problem, std::generic_category(), "madvise(MADV_POPULATE_WRITE)");
  }
}

void* HostRange::leave() noexcept {
  void* const base = base_;
  base_ = nullptr;
  return base;
}

void free_host_range(void* base, Bytes size) noexcept {
  munmap(base, round_up(size.count(), page_size().count()));
}

}  // namespace egm
