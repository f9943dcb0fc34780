// Residency of managed memory: moves, eviction, first touch.
#include "managed.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>

#include "machine.h"

namespace egm_sim {
namespace {

uint64_t next_use() {
  static uint64_t counter = 0;
  return ++counter;
}

void* chunk_address(const Allocation& allocation, size_t index) {
  return reinterpret_cast<void*>(allocation.base + index * kChunk);
}

void set_where(Allocation& allocation, size_t index, int where) {
  Chunk& chunk = allocation.pages->chunks[index];
  const size_t bytes = chunk_bytes(allocation, index);
  ManagedPages& pages = *allocation.pages;
  pages.on_device.resize(static_cast<size_t>(machine().devices));
  if (chunk.where >= 0) {
    hbm(chunk.where).resident -= bytes;
    --pages.on_device[chunk.where];
  }
  chunk.where = static_cast<int16_t>(where);
  if (where >= 0) {
    hbm(where).resident += bytes;
    ++pages.on_device[where];
    pages.evict_from = std::min(pages.evict_from, index);
    madvise(chunk_address(allocation, index), std::min(kChunk, allocation.piece.bytes),
            MADV_DONTNEED);
  }
}

// The managed allocation of least recent use that has chunks on the device.
Allocation* coldest(int device, const Allocation* spare) {
  Allocation* found = nullptr;
  for (const auto& [base, allocation] : allocations()) {
    if (allocation->kind != Kind::kManaged || allocation.get() == spare) continue;
    if (found && allocation->pages->last_use >= found->pages->last_use) continue;
    const auto& on_device = allocation->pages->on_device;
    if (!on_device.empty() && on_device[device] > 0) found = allocation.get();
  }
  return found;
}

int home_of(const Chunk& chunk, int toucher) {
  switch (chunk.preferred.type) {
    case cudaMemLocationTypeDevice:
      return chunk.preferred.id;
    case cudaMemLocationTypeInvalid:
      return toucher;
    default:
      return kHost;
  }
}

}  // namespace

ChunkRange chunks_of(const void* address, size_t bytes) {
  Allocation* allocation = allocation_of(address);
  if (!allocation || allocation->kind != Kind::kManaged || bytes == 0) return {nullptr, 0, 0};
  const size_t offset = reinterpret_cast<uintptr_t>(address) - allocation->base;
  const size_t end = std::min(offset + bytes, allocation->size);
  return {allocation, offset / kChunk, (end + kChunk - 1) / kChunk};
}

size_t chunk_bytes(const Allocation& allocation, size_t index) {
  return std::min(kChunk, allocation.size - index * kChunk);
}

void evict(int device, size_t bytes, const Allocation* spare) {
  size_t freed = 0;
  while (freed < bytes) {
    Allocation* victim = coldest(device, spare);
    if (!victim) return;
    ManagedPages& pages = *victim->pages;
    bool contiguous = true;  // so far, nothing behind us is on any device
    for (size_t i = pages.evict_from; i < pages.chunks.size() && freed < bytes; ++i) {
      if (contiguous) pages.evict_from = i;
      if (pages.chunks[i].where >= 0 && pages.chunks[i].where != device) contiguous = false;
      if (pages.chunks[i].where != device) continue;
      set_where(*victim, i, kHost);
      freed += chunk_bytes(*victim, i);
      hbm(device).evicted += chunk_bytes(*victim, i);
    }
  }
}

void move_chunk(Allocation& allocation, size_t index, int where) {
  allocation.pages->last_use = next_use();
  if (allocation.pages->chunks[index].where == where) return;
  if (where >= 0) {
    const size_t bytes = chunk_bytes(allocation, index);
    const auto room = [&] {
      const Hbm& h = hbm(where);
      return h.taken + h.resident + bytes <= h.capacity;
    };
    if (!room()) evict(where, bytes, &allocation);
    if (!room()) evict(where, bytes, nullptr);
    if (!room()) where = kHost;
  }
  set_where(allocation, index, where);
}

void touch(const void* address, size_t bytes, int by) {
  const ChunkRange range = chunks_of(address, bytes);
  for (size_t i = range.first; i < range.last; ++i) {
    const Chunk& chunk = range.allocation->pages->chunks[i];
    if (chunk.where == kUnpopulated) {
      move_chunk(*range.allocation, i, home_of(chunk, by));
      continue;
    }
    // Mapped remotely instead of moved: advised so, or its home is where it already is.
    const uint64_t bit = by < 0 ? kCpuBit : uint64_t{1} << by;
    const bool stays = chunk.where == home_of(chunk, by) || (chunk.accessed_by & bit && by >= 0) ||
                       (by < 0 && machine().preset->direct_host_access);
    if (!stays) move_chunk(*range.allocation, i, by);
  }
}

void hide_from_cpu(const void* address, size_t bytes) {
  const ChunkRange range = chunks_of(address, bytes);
  for (size_t i = range.first; i < range.last; ++i) {
    if (range.allocation->pages->chunks[i].where >= 0) {
      madvise(chunk_address(*range.allocation, i), std::min(kChunk, range.allocation->piece.bytes),
              MADV_DONTNEED);
    }
  }
}

// /proc/self/pagemap has 8 bytes a page; bit 63 says that it is mapped (kernel documentation,
// admin-guide/mm/pagemap).
void refresh(const ChunkRange& range) {
  if (!range.allocation) return;
  static const int pagemap = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
  const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  std::vector<uint64_t> entries(kChunk / page);
  for (size_t i = range.first; i < range.last; ++i) {
    const Chunk& chunk = range.allocation->pages->chunks[i];
    if (chunk.where == kHost) continue;
    const size_t count = (chunk_bytes(*range.allocation, i) + page - 1) / page;
    const off_t at =
        static_cast<off_t>((range.allocation->base + i * kChunk) / page * sizeof(uint64_t));
    const ssize_t got = pread(pagemap, entries.data(), count * sizeof(uint64_t), at);
    for (ssize_t k = 0; k < got / static_cast<ssize_t>(sizeof(uint64_t)); ++k) {
      if (!(entries[k] >> 63)) continue;
      if (chunk.where == kUnpopulated || !machine().preset->direct_host_access) {
        set_where(*range.allocation, i, kHost);
      }
      break;
    }
  }
}

void discard(const ChunkRange& range) {
  for (size_t i = range.first; i < range.last; ++i) {
    set_where(*range.allocation, i, kUnpopulated);
  }
}

}  // namespace egm_sim
