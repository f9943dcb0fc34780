// The pair's malloc as torch's whole allocator calls it (egm_alloc.pluggable_allocator()).
#include <c10/util/Exception.h>
#include <cuda_runtime_api.h>

#include "c_api/pair.h"
#include "core/units.h"
#include "cuda/errors.h"

extern "C" {

// CUDAPluggableAllocator takes null for an address, and the tensor would end the process once it is
// read. The pair has said on stderr why there is no memory.
__attribute__((visibility("default"))) void* egm_alloc_pluggable_malloc(size_t size, int device,
                                                                        cudaStream_t) {
  // Not under torch's lock: it may wait for host memory.
  void* const base = egm::pair_malloc(size, device, nullptr);
  TORCH_CHECK_WITH(OutOfMemoryError, base != nullptr || size == 0,
                   "CUDA out of memory. egm_alloc could not allocate ",
                   egm::describe(egm::Bytes(size)), " on device ", device,
                   "; the line on stderr that begins with [managed_alloc] says why");
  return base;
}

}  // extern "C"
