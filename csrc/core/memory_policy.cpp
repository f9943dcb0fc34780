// The policy by get_mempolicy(2).
#include "core/memory_policy.h"

#include <sys/syscall.h>
#include <unistd.h>

#include <cstddef>

namespace egm {

std::optional<std::set<int>> bound_nodes() {
  // Other policies prefer nodes, and fall back to the rest.
  constexpr int kBind = 2;           // MPOL_BIND
  constexpr int kFlags = 0x7 << 13;  // MPOL_MODE_FLAGS
  constexpr size_t kNodes = 1024;
  constexpr size_t kBits = 8 * sizeof(unsigned long);
  int mode = 0;
  unsigned long mask[kNodes / kBits] = {};
  if (syscall(SYS_get_mempolicy, &mode, mask, kNodes, nullptr, 0) != 0) return std::nullopt;
  if ((mode & ~kFlags) != kBind) return std::nullopt;
  std::set<int> nodes;
  for (size_t node = 0; node < kNodes; ++node) {
    if ((mask[node / kBits] >> (node % kBits) & 1) != 0) nodes.insert(static_cast<int>(node));
  }
  return nodes;
}

}  // namespace egm
