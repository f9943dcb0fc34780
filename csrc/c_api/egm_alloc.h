/* The C interface of egm_alloc: managed memory as a malloc/free pair, in the signature of
 * torch.cuda.memory.CUDAPluggableAllocator. Plain C; needs only the CUDA runtime's headers. */
#ifndef EGM_ALLOC_H_
#define EGM_ALLOC_H_

#include <cuda_runtime_api.h>
#include <stddef.h>
#include <sys/types.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Allocates `size` bytes of managed memory (cudaMallocManaged, attach-global) for `device`:
 * preferred location and accessed-by as configured (default: the GPU, the CPU), prefetched to the
 * device if 0 < size < threshold, unless `prefetch` is off. A failed advice or prefetch is a line
 * on stderr, and the memory is returned. Returns NULL for size 0, and on failure with a line on
 * stderr. Waits for no request under way to leave room in host memory. The caller's current device
 * is kept. `stream` is not used. */
void* managed_malloc(size_t size, int device, cudaStream_t stream);

/* Frees what managed_malloc returned; NULL is allowed. Waits for `stream` first unless it is NULL.
 * `size` and `device` are not needed and not checked. */
void managed_free(void* ptr, size_t size, int device, cudaStream_t stream);

#ifdef __cplusplus
}
#endif

#endif /* EGM_ALLOC_H_ */
