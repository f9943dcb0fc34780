// Managed memory: where each 2 MiB of it is, and the advice it was given. Callers hold the lock.
//
// A page in HBM is not mapped for the CPU, as on a PCIe machine: its bytes stay in physical memory
// (memory.h) while its page-table entries are dropped. The kernel maps it again when the CPU
// touches it, and refresh() reads from the kernel's page map which pages that happened to.
#pragma once

#include <cstdint>
#include <vector>

#include "memory.h"

namespace egm_sim {

constexpr size_t kChunk = size_t{2} << 20;
constexpr int kHost = -1;         // cudaCpuDeviceId
constexpr int kUnpopulated = -2;  // cudaInvalidDeviceId

struct Chunk {
  int16_t where = kUnpopulated;
  cudaMemLocation preferred{cudaMemLocationTypeInvalid, kUnpopulated};
  cudaMemLocation prefetched{cudaMemLocationTypeInvalid, kUnpopulated};
  uint64_t accessed_by = 0;  // one bit a device, the CPU is bit 63
  bool read_mostly = false;
};

struct ManagedPages {
  std::vector<Chunk> chunks;
  uint64_t last_use = 0;
  std::vector<size_t> on_device;  // number of chunks on each device
  size_t evict_from = 0;          // no chunk before this one is on a device
};

constexpr uint64_t kCpuBit = uint64_t{1} << 63;

// The chunks that a range touches. A partly covered chunk counts as covered.
struct ChunkRange {
  Allocation* allocation;
  size_t first;
  size_t last;  // exclusive
};
// Of managed memory only: an empty range (allocation == nullptr) for anything else.
ChunkRange chunks_of(const void* address, size_t bytes);
size_t chunk_bytes(const Allocation& allocation, size_t index);

// Brings a chunk to a device or kHost. HBM that is full evicts, and if all of it is held by memory
// that cannot move, the chunk goes to the host instead.
void move_chunk(Allocation& allocation, size_t index, int where);
// Moves managed chunks of least recent use to the host until `bytes` of HBM are free of them.
void evict(int device, size_t bytes, const Allocation* spare);
// What a read or write of a range by a device (or kHost) does to residency.
void touch(const void* address, size_t bytes, int by);
// Drops CPU mappings of chunks in HBM, after the simulator itself wrote to them.
void hide_from_cpu(const void* address, size_t bytes);
// Learns from the kernel which chunks the CPU has touched since.
void refresh(const ChunkRange& range);
// Takes everything of an allocation out of HBM's books, before it is freed.
void discard(const ChunkRange& range);

}  // namespace egm_sim
