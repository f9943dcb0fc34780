// Memory of the simulated machine: which addresses are whose, and how full each device is. No CUDA
// function is defined here; callers hold the lock.
//
// All bytes come from one sparse memfd, "physical memory": a device allocation is a mapping of a
// piece of it. So two mappings of one piece alias, another process can open a piece (IPC), and
// freeing gives the bytes back at once.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>

#include "api.h"

namespace egm_sim {

struct ManagedPages;

enum class Kind { kDevice, kManaged, kAsync, kVmm, kVmmHost, kHost, kRegistered, kImported };
constexpr int kKinds = 8;
const char* kind_name(Kind kind);

// A piece of physical memory.
struct Piece {
  uint64_t offset = 0;
  size_t bytes = 0;
};

struct Allocation {
  Kind kind;
  uintptr_t base = 0;
  size_t size = 0;
  int device = 0;
  uint64_t id = 0;
  Piece piece;
  std::unique_ptr<ManagedPages> pages;  // of managed memory only
  unsigned flags = 0;
  uintptr_t device_base = 0;  // where devices see it, if that is another address
  ~Allocation();
};

// HBM of one device, in bytes.
struct Hbm {
  size_t capacity = 0;
  size_t taken = 0;     // by allocations that stay
  size_t resident = 0;  // by managed pages, which can be evicted
  size_t evicted = 0;   // in total, by any cause
};

int physical_memory_fd();
Piece take_piece(size_t bytes);
// Drops the bytes; reads through mappings that remain give zeroes.
void drop_piece(const Piece& piece);

Hbm& hbm(int device);
// Takes HBM, evicting managed pages if it must; false if it is full.
bool take_hbm(int device, size_t bytes);
void give_back_hbm(int device, size_t bytes);

// Memory of one CPU node that cuMemCreate can take: the carve-out where there is one.
struct HostNode {
  size_t total = 0;
  size_t taken = 0;
};
// nullptr if there is no such node.
HostNode* host_node(int id);

// A new allocation, mapped and on the books, or nullptr. HBM is not taken here.
Allocation* map_allocation(Kind kind, size_t size, int device);
// A book entry for memory that is somebody else's, or mapped elsewhere.
Allocation* enter_allocation(Kind kind, uintptr_t base, size_t size, int device);
// Unmaps and forgets.
void unmap_allocation(Allocation* allocation);
void forget_allocation(Allocation* allocation);

// The allocation that contains an address, or nullptr.
Allocation* allocation_of(const void* address);
// Any allocation that shares bytes with a range, or nullptr.
Allocation* allocation_in(const void* address, size_t bytes);
// The allocation that starts there, or nullptr.
Allocation* allocation_at(const void* address);
const std::map<uintptr_t, std::unique_ptr<Allocation>>& allocations();
// The address by which devices know a byte of it.
void* seen_by_devices(const Allocation& allocation, const void* address);

// Zeroes a range, giving whole pages of physical memory back instead of writing them.
void zero_range(void* address, size_t bytes);
// The same for a range that is known to be a mapping of physical memory.
void zero_physical(void* address, size_t bytes);

}  // namespace egm_sim
