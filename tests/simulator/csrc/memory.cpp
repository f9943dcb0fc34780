// Bookkeeping of addresses, physical memory and HBM.
#include "memory.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstring>
#include <vector>

#include "machine.h"
#include "managed.h"

namespace egm_sim {
namespace {

using Table = std::map<uintptr_t, std::unique_ptr<Allocation>>;

Table& table() {
  static Table* const instance = new Table;
  return *instance;
}

size_t round_up(size_t value, size_t unit) { return (value + unit - 1) / unit * unit; }

// Maps a piece at an address that is a multiple of `alignment`.
void* map_aligned(const Piece& piece, size_t alignment) {
  const size_t room = piece.bytes + alignment;
  void* reserved =
      mmap(nullptr, room, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (reserved == MAP_FAILED) return nullptr;
  const uintptr_t start = reinterpret_cast<uintptr_t>(reserved);
  const uintptr_t base = round_up(start, alignment);
  void* mapped = mmap(reinterpret_cast<void*>(base), piece.bytes, PROT_READ | PROT_WRITE,
                      MAP_SHARED | MAP_FIXED | MAP_NORESERVE, physical_memory_fd(), piece.offset);
  if (base > start) munmap(reserved, base - start);
  const uintptr_t end = base + piece.bytes;
  if (start + room > end) munmap(reinterpret_cast<void*>(end), start + room - end);
  return mapped == MAP_FAILED ? nullptr : mapped;
}

}  // namespace

Allocation::~Allocation() = default;

const char* kind_name(Kind kind) {
  constexpr const char* kNames[kKinds] = {"device",   "managed", "async",      "vmm",
                                          "vmm-host", "host",    "registered", "imported"};
  return kNames[static_cast<int>(kind)];
}

int physical_memory_fd() {
  static const int fd = [] {
    const int created = memfd_create("egm_sim_memory", MFD_CLOEXEC);
    // Sparse: only written pages cost memory. 2^62 bytes are never used up, so no piece is reused.
    if (created >= 0 && ftruncate(created, off_t{1} << 62) != 0) return -1;
    return created;
  }();
  return fd;
}

Piece take_piece(size_t bytes) {
  static uint64_t next = 0;
  const Piece piece{next, round_up(bytes ? bytes : 1, bytes >= kMiB ? 2 * kMiB : 64 * kKiB)};
  next += piece.bytes;
  return piece;
}

void drop_piece(const Piece& piece) {
  fallocate(physical_memory_fd(), FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
            static_cast<off_t>(piece.offset), static_cast<off_t>(piece.bytes));
}

Hbm& hbm(int device) {
  static std::vector<Hbm>* const all = [] {
    auto* created = new std::vector<Hbm>(machine().devices);
    for (Hbm& one : *created) one.capacity = machine().hbm_bytes;
    return created;
  }();
  return (*all)[device];
}

bool take_hbm(int device, size_t bytes) {
  Hbm& h = hbm(device);
  if (h.taken + bytes > h.capacity) return false;
  const size_t limit = h.capacity - h.taken - bytes;
  if (h.resident > limit) evict(device, h.resident - limit, nullptr);
  h.taken += bytes;
  return true;
}

void give_back_hbm(int device, size_t bytes) { hbm(device).taken -= bytes; }

HostNode* host_node(int id) {
  static std::vector<HostNode>* const all = [] {
    const Machine& m = machine();
    const size_t bytes = m.egm_bytes > 0 ? m.egm_bytes : m.host_bytes;
    const auto count = static_cast<size_t>(m.host_nodes);
    return new std::vector<HostNode>(count, HostNode{bytes / count, 0});
  }();
  return id >= 0 && id < machine().host_nodes ? &(*all)[id] : nullptr;
}

Allocation* enter_allocation(Kind kind, uintptr_t base, size_t size, int device) {
  static uint64_t next_id = 0;
  auto allocation = std::make_unique<Allocation>();
  allocation->kind = kind;
  allocation->base = base;
  allocation->size = size;
  allocation->device = device;
  allocation->id = ++next_id;
  Allocation* entered = allocation.get();
  table()[base] = std::move(allocation);
  return entered;
}

Allocation* map_allocation(Kind kind, size_t size, int device) {
  const Piece piece = take_piece(size);
  // cudaMalloc aligns to 512 bytes and gives large requests 2 MiB pages; ours are never smaller
  // than a page of the host.
  void* base = map_aligned(piece, piece.bytes >= 2 * kMiB ? 2 * kMiB : 64 * kKiB);
  if (!base) return nullptr;
  Allocation* allocation = enter_allocation(kind, reinterpret_cast<uintptr_t>(base), size, device);
  allocation->piece = piece;
  return allocation;
}

void forget_allocation(Allocation* allocation) { table().erase(allocation->base); }

void unmap_allocation(Allocation* allocation) {
  munmap(reinterpret_cast<void*>(allocation->base), allocation->piece.bytes);
  drop_piece(allocation->piece);
  forget_allocation(allocation);
}

Allocation* allocation_of(const void* address) {
  const uintptr_t at = reinterpret_cast<uintptr_t>(address);
  auto next = table().upper_bound(at);
  if (next == table().begin()) return nullptr;
  Allocation* allocation = std::prev(next)->second.get();
  const size_t size = allocation->size ? allocation->size : 1;
  return at - allocation->base < size ? allocation : nullptr;
}

Allocation* allocation_in(const void* address, size_t bytes) {
  const auto next = table().lower_bound(reinterpret_cast<uintptr_t>(address));
  if (next != table().end() && next->first - reinterpret_cast<uintptr_t>(address) < bytes) {
    return next->second.get();
  }
  return allocation_of(address);
}

Allocation* allocation_at(const void* address) {
  const auto found = table().find(reinterpret_cast<uintptr_t>(address));
  return found == table().end() ? nullptr : found->second.get();
}

const Table& allocations() { return table(); }

void* seen_by_devices(const Allocation& allocation, const void* address) {
  const uintptr_t at = reinterpret_cast<uintptr_t>(address);
  const bool elsewhere = allocation.device_base != 0;
  return reinterpret_cast<void*>(elsewhere ? allocation.device_base + (at - allocation.base) : at);
}

void zero_range(void* address, size_t bytes) {
  const Allocation* allocation = allocation_of(address);
  if (allocation && allocation->piece.bytes > 0) {
    zero_physical(address, bytes);
  } else {
    std::memset(address, 0, bytes);
  }
}

void zero_physical(void* address, size_t bytes) {
  const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  const uintptr_t start = reinterpret_cast<uintptr_t>(address);
  const uintptr_t first = round_up(start, page);
  const uintptr_t last = (start + bytes) / page * page;
  // Takes the pages out of the file behind the mapping (madvise(2)).
  if (last <= first || madvise(reinterpret_cast<void*>(first), last - first, MADV_REMOVE) != 0) {
    std::memset(address, 0, bytes);
    return;
  }
  std::memset(address, 0, first - start);
  std::memset(reinterpret_cast<void*>(last), 0, start + bytes - last);
}

}  // namespace egm_sim
