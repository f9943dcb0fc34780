// Stream-ordered allocation (cudaMallocAsync and its pools, one a device) and sharing with other
// processes. A pool keeps nothing back: cudaFreeAsync frees at once.
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstdio>
#include <cstring>

#include "machine.h"
#include "memory.h"
#include "streams.h"

namespace egm_sim {
namespace {

struct Pool {
  int device;
  uint64_t threshold = 0;
  uint64_t used = 0;
  uint64_t used_high = 0;
};

Pool* pool_of(int device) {
  static auto* const pools = [] {
    auto* made = new std::vector<Pool>;
    for (int i = 0; i < machine().devices; ++i) made->push_back(Pool{i});
    return made;
  }();
  return &(*pools)[device];
}

cudaError_t allocate(void** out, size_t size, int device, Call& call) {
  if (!take_hbm(device, (size + 511) / 512 * 512)) return cudaErrorMemoryAllocation;
  Allocation* allocation = map_allocation(Kind::kAsync, size, device);
  Pool* pool = pool_of(device);
  pool->used += size;
  pool->used_high = std::max(pool->used_high, pool->used);
  *out = reinterpret_cast<void*>(allocation->base);
  call.note({"ptr", *out});
  return cudaSuccess;
}

uint64_t pool_attribute(const Pool& pool, cudaMemPoolAttr which) {
  switch (which) {
    case cudaMemPoolAttrReleaseThreshold:
      return pool.threshold;
    case cudaMemPoolAttrReservedMemCurrent:
    case cudaMemPoolAttrUsedMemCurrent:
      return pool.used;
    case cudaMemPoolAttrReservedMemHigh:
    case cudaMemPoolAttrUsedMemHigh:
      return pool.used_high;
    default:
      return 1;  // the reuse policies, which are ints and on
  }
}

// What travels in a cudaIpcMemHandle_t: where the other process finds the physical memory.
struct SharedPiece {
  int process;
  int fd;
  int device;
  uint64_t offset;
  uint64_t bytes;
};
static_assert(sizeof(SharedPiece) <= sizeof(cudaIpcMemHandle_t));

cudaError_t import_piece(void** out, const SharedPiece& shared) {
  if (shared.process == getpid()) return cudaErrorInvalidValue;
  char path[64];
  std::snprintf(path, sizeof path, "/proc/%d/fd/%d", shared.process, shared.fd);
  const int fd = open(path, O_RDWR | O_CLOEXEC);
  if (fd < 0) return cudaErrorInvalidValue;
  void* mapped = mmap(nullptr, shared.bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, fd,
                      static_cast<off_t>(shared.offset));
  close(fd);
  if (mapped == MAP_FAILED) return cudaErrorMemoryAllocation;
  enter_allocation(Kind::kImported, reinterpret_cast<uintptr_t>(mapped), shared.bytes,
                   shared.device);
  *out = mapped;
  return cudaSuccess;
}

}  // namespace
}  // namespace egm_sim

using namespace egm_sim;

extern "C" {

cudaError_t cudaDeviceGetDefaultMemPool(cudaMemPool_t* pool, int device) {
  return api("cudaDeviceGetDefaultMemPool", kPlain, {{"device", device}}, [&](Call&) {
    if (!device_exists(device)) return cudaErrorInvalidDevice;
    *pool = reinterpret_cast<cudaMemPool_t>(pool_of(device));
    return cudaSuccess;
  });
}

cudaError_t cudaDeviceGetMemPool(cudaMemPool_t* pool, int device) {
  return cudaDeviceGetDefaultMemPool(pool, device);
}

cudaError_t cudaMemPoolGetAttribute(cudaMemPool_t pool, cudaMemPoolAttr which, void* value) {
  return api("cudaMemPoolGetAttribute", kPlain, {{"attribute", which}}, [&](Call&) {
    const uint64_t answer = pool_attribute(*reinterpret_cast<Pool*>(pool), which);
    if (which < cudaMemPoolAttrReleaseThreshold) {
      *static_cast<int*>(value) = static_cast<int>(answer);
    } else {
      *static_cast<uint64_t*>(value) = answer;
    }
    return cudaSuccess;
  });
}

cudaError_t cudaMemPoolSetAttribute(cudaMemPool_t handle, cudaMemPoolAttr which, void* value) {
  return api("cudaMemPoolSetAttribute", kPlain, {{"attribute", which}}, [&](Call&) {
    Pool& pool = *reinterpret_cast<Pool*>(handle);
    if (which == cudaMemPoolAttrReleaseThreshold) pool.threshold = *static_cast<uint64_t*>(value);
    if (which == cudaMemPoolAttrUsedMemHigh) pool.used_high = pool.used;
    return cudaSuccess;
  });
}

cudaError_t cudaMemPoolSetAccess(cudaMemPool_t, const cudaMemAccessDesc*, size_t) {
  return api("cudaMemPoolSetAccess", kPlain, {}, [](Call&) { return cudaSuccess; });
}

cudaError_t cudaMemPoolTrimTo(cudaMemPool_t, size_t keep) {
  return api("cudaMemPoolTrimTo", kPlain, {{"keep", keep}}, [](Call&) { return cudaSuccess; });
}

cudaError_t cudaMallocAsync(void** out, size_t size, cudaStream_t stream) {
  return api("cudaMallocAsync", kPlain, {{"size", size}, {"stream", stream}}, [&](Call& call) {
    const Stream* found = find_stream(stream);
    if (!found) return cudaErrorInvalidResourceHandle;
    return allocate(out, size, found->device, call);
  });
}

cudaError_t cudaMallocFromPoolAsync(void** out, size_t size, cudaMemPool_t pool,
                                    cudaStream_t stream) {
  return api(
      "cudaMallocFromPoolAsync", kPlain, {{"size", size}, {"stream", stream}},
      [&](Call& call) { return allocate(out, size, reinterpret_cast<Pool*>(pool)->device, call); });
}

cudaError_t cudaFreeAsync(void* ptr, cudaStream_t stream) {
  return api("cudaFreeAsync", kPlain, {{"ptr", ptr}, {"stream", stream}}, [&](Call&) {
    Allocation* allocation = allocation_at(ptr);
    if (!allocation || allocation->kind != Kind::kAsync) return cudaErrorInvalidValue;
    pool_of(allocation->device)->used -= allocation->size;
    give_back_hbm(allocation->device, (allocation->size + 511) / 512 * 512);
    unmap_allocation(allocation);
    return cudaSuccess;
  });
}

cudaError_t cudaIpcGetMemHandle(cudaIpcMemHandle_t* handle, void* ptr) {
  return api("cudaIpcGetMemHandle", kPlain, {{"ptr", ptr}}, [&](Call&) {
    const Allocation* allocation = allocation_of(ptr);
    if (!allocation || allocation->kind != Kind::kDevice) return cudaErrorInvalidValue;
    const SharedPiece shared{getpid(), physical_memory_fd(), allocation->device,
                             allocation->piece.offset, allocation->piece.bytes};
    std::memset(handle, 0, sizeof *handle);
    std::memcpy(handle, &shared, sizeof shared);
    return cudaSuccess;
  });
}

cudaError_t cudaIpcOpenMemHandle(void** out, cudaIpcMemHandle_t handle, unsigned flags) {
  return api("cudaIpcOpenMemHandle", kPlain, {{"flags", flags}}, [&](Call&) {
    SharedPiece shared;
    std::memcpy(&shared, &handle, sizeof shared);
    return import_piece(out, shared);
  });
}

cudaError_t cudaIpcCloseMemHandle(void* ptr) {
  return api("cudaIpcCloseMemHandle", kPlain, {{"ptr", ptr}}, [&](Call&) {
    Allocation* allocation = allocation_at(ptr);
    if (!allocation || allocation->kind != Kind::kImported) return cudaErrorInvalidValue;
    munmap(ptr, allocation->size);
    forget_allocation(allocation);
    return cudaSuccess;
  });
}

// An event of another process has always happened: its work was done when it was submitted.
cudaError_t cudaIpcGetEventHandle(cudaIpcEventHandle_t* handle, cudaEvent_t event) {
  return api("cudaIpcGetEventHandle", kPlain, {{"event", event}}, [&](Call&) {
    std::memset(handle, 0, sizeof *handle);
    return cudaSuccess;
  });
}

cudaError_t cudaIpcOpenEventHandle(cudaEvent_t* event, cudaIpcEventHandle_t) {
  return cudaEventCreateWithFlags(event, cudaEventDisableTiming | cudaEventInterprocess);
}

}  // extern "C"
