// CUDA functions on memory of the host: pinned by CUDA, or registered with it.
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <vector>

#include "machine.h"
#include "memory.h"
#include "streams.h"

namespace egm_sim {
namespace {

cudaError_t allocate_host(const char* name, void** out, size_t size, unsigned flags) {
  return api(name, kUnsafeInCapture, {{"size", size}, {"flags", flags}}, [&](Call& call) {
    *out = nullptr;
    if (size == 0) return cudaSuccess;
    Allocation* allocation = map_allocation(Kind::kHost, size, current_device());
    if (!allocation) return cudaErrorMemoryAllocation;
    allocation->flags = flags;
    *out = reinterpret_cast<void*>(allocation->base);
    call.note({"ptr", *out});
    return cudaSuccess;
  });
}

// Whether every page of a range is mapped in this process: mincore(2) fails for one that is not.
bool is_mapped(const void* address, size_t bytes) {
  const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  uintptr_t at = reinterpret_cast<uintptr_t>(address) / page * page;
  const uintptr_t end = reinterpret_cast<uintptr_t>(address) + bytes;
  std::vector<unsigned char> pages(4096);
  while (at < end) {
    const size_t step = std::min<size_t>(end - at, pages.size() * page);
    if (mincore(reinterpret_cast<void*>(at), step, pages.data()) != 0) return false;
    at += step;
  }
  return true;
}

// An address of its own for devices, where the machine does not let them use the CPU's. Nothing is
// there: who goes by it faults.
uintptr_t other_address(size_t bytes) {
  void* got = mmap(nullptr, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  return got == MAP_FAILED ? 0 : reinterpret_cast<uintptr_t>(got);
}

cudaError_t register_host(void* ptr, size_t size, unsigned flags) {
  constexpr unsigned kFlags = cudaHostRegisterPortable | cudaHostRegisterMapped |
                              cudaHostRegisterIoMemory | cudaHostRegisterReadOnly;
  if (!ptr || size == 0 || flags & ~kFlags) return cudaErrorInvalidValue;
  if (allocation_in(ptr, size)) return cudaErrorHostMemoryAlreadyRegistered;
  if (!is_mapped(ptr, size)) return cudaErrorInvalidValue;
  Allocation* allocation =
      enter_allocation(Kind::kRegistered, reinterpret_cast<uintptr_t>(ptr), size, current_device());
  allocation->flags = flags;
  if (!machine().registered_at_host_address) allocation->device_base = other_address(size);
  return cudaSuccess;
}

cudaError_t unregister_host(void* ptr) {
  Allocation* allocation = allocation_at(ptr);
  if (!allocation || allocation->kind != Kind::kRegistered) return cudaErrorHostMemoryNotRegistered;
  if (allocation->device_base) {
    munmap(reinterpret_cast<void*>(allocation->device_base), allocation->size);
  }
  forget_allocation(allocation);
  note_unmapping();
  return cudaSuccess;
}

bool is_host(const Allocation& allocation) {
  return allocation.kind == Kind::kHost || allocation.kind == Kind::kRegistered;
}

}  // namespace
}  // namespace egm_sim

using namespace egm_sim;

extern "C" {

cudaError_t cudaHostAlloc(void** out, size_t size, unsigned flags) {
  return allocate_host("cudaHostAlloc", out, size, flags);
}

cudaError_t cudaMallocHost(void** out, size_t size) {
  return allocate_host("cudaMallocHost", out, size, 0);
}

cudaError_t cudaFreeHost(void* ptr) {
  return api("cudaFreeHost", kUnsafeInCapture, {{"ptr", ptr}}, [&](Call&) {
    if (!ptr) return cudaSuccess;
    Allocation* allocation = allocation_at(ptr);
    if (!allocation || allocation->kind != Kind::kHost) return cudaErrorInvalidValue;
    for (int device = 0; device < machine().devices; ++device) complete_device(device);
    unmap_allocation(allocation);
    return cudaSuccess;
  });
}

cudaError_t cudaHostRegister(void* ptr, size_t size, unsigned flags) {
  return api("cudaHostRegister", kUnsafeInCapture, {{"ptr", ptr}, {"size", size}, {"flags", flags}},
             [&](Call&) { return register_host(ptr, size, flags); });
}

cudaError_t cudaHostUnregister(void* ptr) {
  return api("cudaHostUnregister", kUnsafeInCapture, {{"ptr", ptr}},
             [&](Call&) { return unregister_host(ptr); });
}

cudaError_t cudaHostGetDevicePointer(void** device, void* host, unsigned flags) {
  return api("cudaHostGetDevicePointer", kPlain, {{"ptr", host}, {"flags", flags}}, [&](Call&) {
    const Allocation* allocation = allocation_of(host);
    if (flags != 0 || !allocation || !is_host(*allocation)) return cudaErrorInvalidValue;
    *device = seen_by_devices(*allocation, host);
    return cudaSuccess;
  });
}

cudaError_t cudaHostGetFlags(unsigned* flags, void* host) {
  return api("cudaHostGetFlags", kPlain, {{"ptr", host}}, [&](Call&) {
    const Allocation* allocation = allocation_of(host);
    if (!allocation || !is_host(*allocation)) return cudaErrorInvalidValue;
    *flags = allocation->flags;
    return cudaSuccess;
  });
}

}  // extern "C"
