// Kernels: registration of modules, launches that do nothing, and questions about functions.
#include <vector_types.h>

#include <cstring>
#include <unordered_map>
#include <vector>

#include "machine.h"
#include "memory.h"
#include "streams.h"

namespace egm_sim {
namespace {

struct Variable {
  size_t size = 0;
  void* storage = nullptr;  // made at the first question for it
};

// Modules register while libraries load, before anything else is called: no lock, one thread.
std::unordered_map<const void*, Variable>& variables() {
  static auto* const all = new std::unordered_map<const void*, Variable>;
  return *all;
}

Variable* variable(const void* symbol) {
  const auto found = variables().find(symbol);
  if (found == variables().end()) return nullptr;
  Variable& it = found->second;
  if (!it.storage) {
    it.storage = reinterpret_cast<void*>(
        map_allocation(Kind::kDevice, it.size ? it.size : 1, current_device())->base);
  }
  return &it;
}

cudaError_t launch(const char* name, const void* function, cudaStream_t stream) {
  return api(name, kQuiet, {{"function", function}, {"stream", stream}},
             [&](Call&) { return submit(stream, cudaGraphNodeTypeKernel, nullptr); });
}

struct LaunchConfiguration {
  dim3 grid, block;
  size_t shared_memory;
  cudaStream_t stream;
};
// Leaked: kernels may be launched while thread-locals go away.
std::vector<LaunchConfiguration>& pending() {
  thread_local auto* const stack = new std::vector<LaunchConfiguration>;
  return *stack;
}

void describe(cudaFuncAttributes& out) {
  const Preset& preset = *machine().preset;
  std::memset(&out, 0, sizeof out);
  out.maxThreadsPerBlock = 1024;
  out.numRegs = 32;
  out.ptxVersion = out.binaryVersion = preset.major * 10 + preset.minor;
  out.maxDynamicSharedSizeBytes = 48 << 10;
}

int blocks_per_multiprocessor(int block_size) {
  if (block_size <= 0) return 1;
  const int blocks = device_attribute(cudaDevAttrMaxThreadsPerMultiProcessor, 0) / block_size;
  return blocks < 1 ? 1 : blocks > 32 ? 32 : blocks;
}

}  // namespace
}  // namespace egm_sim

using namespace egm_sim;

extern "C" {

void** __cudaRegisterFatBinary(void*) {
  static void* handle = nullptr;
  return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
char __cudaInitModule(void**) { return 1; }
void __cudaRegisterFunction(void**, const char*, char*, const char*, int, uint3*, uint3*, dim3*,
                            dim3*, int*) {}
void __cudaRegisterVar(void**, char* symbol, char*, const char*, int, size_t size, int, int) {
  variables()[symbol].size = size;
}
void __cudaRegisterManagedVar(void**, void** symbol, char*, const char*, int, size_t size, int,
                              int) {
  variables()[symbol].size = size;
}
void __cudaRegisterHostVar(void**, const char*, char*, size_t) {}
void __cudaRegisterUnifiedTable(void**, void*) {}

unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared_memory,
                                     cudaStream_t stream) {
  pending().push_back({grid, block, shared_memory, stream});
  return 0;
}

cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared_memory,
                                       void* stream) {
  if (pending().empty()) return cudaErrorMissingConfiguration;
  const LaunchConfiguration top = pending().back();
  pending().pop_back();
  *grid = top.grid;
  *block = top.block;
  *shared_memory = top.shared_memory;
  *static_cast<cudaStream_t*>(stream) = top.stream;
  return cudaSuccess;
}

cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* function) {
  *kernel = reinterpret_cast<cudaKernel_t>(const_cast<void*>(function));
  return cudaSuccess;
}

cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3, dim3, void**, size_t,
                               cudaStream_t stream) {
  return launch("cudaLaunchKernel", kernel, stream);
}

cudaError_t cudaLaunchKernel(const void* function, dim3, dim3, void**, size_t,
                             cudaStream_t stream) {
  return launch("cudaLaunchKernel", function, stream);
}

cudaError_t cudaLaunchCooperativeKernel(const void* function, dim3, dim3, void**, size_t,
                                        cudaStream_t stream) {
  return launch("cudaLaunchCooperativeKernel", function, stream);
}

cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* function, void**) {
  return launch("cudaLaunchKernelExC", function, config->stream);
}

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void* function) {
  return api("cudaFuncGetAttributes", kQuiet, {{"function", function}}, [&](Call&) {
    describe(*attributes);
    return cudaSuccess;
  });
}

cudaError_t cudaFuncSetAttribute(const void* function, cudaFuncAttribute, int) {
  return api("cudaFuncSetAttribute", kQuiet, {{"function", function}},
             [](Call&) { return cudaSuccess; });
}

cudaError_t cudaFuncSetCacheConfig(const void*, cudaFuncCache) { return cudaSuccess; }

cudaError_t cudaKernelSetAttributeForDevice(cudaKernel_t, cudaFuncAttribute, int, int) {
  return cudaSuccess;
}

cudaError_t cudaGetFuncBySymbol(cudaFunction_t* out, const void* symbol) {
  *out = reinterpret_cast<cudaFunction_t>(const_cast<void*>(symbol));
  return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void*, int block_size,
                                                          size_t) {
  *blocks = blocks_per_multiprocessor(block_size);
  return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, const void*,
                                                                   int block_size, size_t,
                                                                   unsigned) {
  *blocks = blocks_per_multiprocessor(block_size);
  return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, const void*, const cudaLaunchConfig_t*) {
  *clusters = device_attribute(cudaDevAttrMultiProcessorCount, 0) / 2;
  return cudaSuccess;
}

cudaError_t cudaOccupancyMaxPotentialClusterSize(int* size, const void*,
                                                 const cudaLaunchConfig_t*) {
  *size = 8;
  return cudaSuccess;
}

cudaError_t cudaOccupancyAvailableDynamicSMemPerBlock(size_t* bytes, const void*, int, int) {
  *bytes = 48 << 10;
  return cudaSuccess;
}

cudaError_t cudaGetSymbolAddress(void** address, const void* symbol) {
  return api("cudaGetSymbolAddress", kPlain, {{"symbol", symbol}}, [&](Call&) {
    Variable* found = variable(symbol);
    if (!found) return cudaErrorInvalidSymbol;
    *address = found->storage;
    return cudaSuccess;
  });
}

cudaError_t cudaGetSymbolSize(size_t* size, const void* symbol) {
  return api("cudaGetSymbolSize", kPlain, {{"symbol", symbol}}, [&](Call&) {
    Variable* found = variable(symbol);
    if (!found) return cudaErrorInvalidSymbol;
    *size = found->size;
    return cudaSuccess;
  });
}

cudaError_t cudaMemcpyToSymbol(const void* symbol, const void* from, size_t bytes, size_t offset,
                               cudaMemcpyKind) {
  return api("cudaMemcpyToSymbol", kUnsafeInCapture, {{"symbol", symbol}, {"size", bytes}},
             [&](Call&) {
               Variable* found = variable(symbol);
               if (!found || offset + bytes > found->size) return cudaErrorInvalidSymbol;
               std::memcpy(static_cast<char*>(found->storage) + offset, from, bytes);
               return cudaSuccess;
             });
}

cudaError_t cudaMemcpyToSymbolAsync(const void* symbol, const void* from, size_t bytes,
                                    size_t offset, cudaMemcpyKind kind, cudaStream_t) {
  return cudaMemcpyToSymbol(symbol, from, bytes, offset, kind);
}

}  // extern "C"
