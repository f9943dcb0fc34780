// CUDA functions on managed memory: allocation, advice, prefetch, discard, attributes.
#include <algorithm>

#include "machine.h"
#include "managed.h"
#include "streams.h"

namespace egm_sim {
namespace {

static_assert(int{cudaMemLocationTypeHostNumaCurrent} ==
              int{CU_MEM_LOCATION_TYPE_HOST_NUMA_CURRENT});
std::string location_text(const cudaMemLocation& location) {
  return egm_sim::location_text(location.type, location.id);
}

const char* advice_text(cudaMemoryAdvise advice) {
  switch (advice) {
    case cudaMemAdviseSetReadMostly:
      return "set-read-mostly";
    case cudaMemAdviseUnsetReadMostly:
      return "unset-read-mostly";
    case cudaMemAdviseSetPreferredLocation:
      return "set-preferred-location";
    case cudaMemAdviseUnsetPreferredLocation:
      return "unset-preferred-location";
    case cudaMemAdviseSetAccessedBy:
      return "set-accessed-by";
    case cudaMemAdviseUnsetAccessedBy:
      return "unset-accessed-by";
    default:
      return "invalid";
  }
}

bool is_host(const cudaMemLocation& location) {
  return location.type == cudaMemLocationTypeHost || location.type == cudaMemLocationTypeHostNuma ||
         location.type == cudaMemLocationTypeHostNumaCurrent;
}

// Without concurrent managed access there is neither advice nor prefetch.
cudaError_t check_location(const cudaMemLocation& location) {
  if (!machine().preset->concurrent_managed) return cudaErrorInvalidDevice;
  if (is_host(location)) return cudaSuccess;
  if (location.type != cudaMemLocationTypeDevice) return cudaErrorInvalidValue;
  return device_exists(location.id) ? cudaSuccess : cudaErrorInvalidDevice;
}

// A range of managed memory; on coherent machines any other memory passes and nothing is recorded.
cudaError_t find_range(const void* ptr, size_t bytes, ChunkRange& range) {
  if (!ptr || bytes == 0) return cudaErrorInvalidValue;
  range = chunks_of(ptr, bytes);
  if (range.allocation) {
    const uintptr_t end = range.allocation->base + range.allocation->size;
    return bytes <= end - reinterpret_cast<uintptr_t>(ptr) ? cudaSuccess : cudaErrorInvalidValue;
  }
  const bool foreign = !allocation_of(ptr) && machine().preset->coherent;
  return foreign ? cudaSuccess : cudaErrorInvalidValue;
}

cudaError_t allocate(void** out, size_t size, unsigned flags, Call& call) {
  if (size == 0 || !out) return cudaErrorInvalidValue;
  if (flags != cudaMemAttachGlobal && flags != cudaMemAttachHost) return cudaErrorInvalidValue;
  size_t managed = 0;
  for (const auto& [base, allocation] : allocations()) {
    if (allocation->kind == Kind::kManaged) managed += allocation->size;
  }
  const size_t room = machine().host_bytes + machine().hbm_bytes * machine().devices;
  if (size > room || managed > room - size) return cudaErrorMemoryAllocation;
  Allocation* allocation = map_allocation(Kind::kManaged, size, current_device());
  if (!allocation) return cudaErrorMemoryAllocation;
  allocation->flags = flags;
  allocation->pages = std::make_unique<ManagedPages>();
  allocation->pages->chunks.resize((size + kChunk - 1) / kChunk);
  *out = reinterpret_cast<void*>(allocation->base);
  call.note({"ptr", *out});
  return cudaSuccess;
}

cudaError_t advise(const void* ptr, size_t bytes, cudaMemoryAdvise advice,
                   const cudaMemLocation& location) {
  const bool needs_location = advice == cudaMemAdviseSetPreferredLocation ||
                              advice == cudaMemAdviseSetAccessedBy ||
                              advice == cudaMemAdviseUnsetAccessedBy;
  if (needs_location) {
    if (cudaError_t error = check_location(location)) return error;
  } else if (!machine().preset->concurrent_managed) {
    return cudaErrorInvalidDevice;
  }
  ChunkRange range{};
  if (cudaError_t error = find_range(ptr, bytes, range)) return error;
  const uint64_t bit = is_host(location) ? kCpuBit : uint64_t{1} << location.id;
  for (size_t i = range.first; i < range.last; ++i) {
    Chunk& chunk = range.allocation->pages->chunks[i];
    switch (advice) {
      case cudaMemAdviseSetReadMostly:
        chunk.read_mostly = true;
        break;
      case cudaMemAdviseUnsetReadMostly:
        chunk.read_mostly = false;
        break;
      case cudaMemAdviseSetPreferredLocation:
        chunk.preferred = location;
        break;
      case cudaMemAdviseUnsetPreferredLocation:
        chunk.preferred = {cudaMemLocationTypeInvalid, kUnpopulated};
        break;
      case cudaMemAdviseSetAccessedBy:
        chunk.accessed_by |= bit;
        break;
      case cudaMemAdviseUnsetAccessedBy:
        chunk.accessed_by &= ~bit;
        break;
      default:
        return cudaErrorInvalidValue;
    }
  }
  return cudaSuccess;
}

cudaError_t prefetch(const void* ptr, size_t bytes, const cudaMemLocation& location,
                     cudaStream_t handle) {
  if (cudaError_t error = check_location(location)) return error;
  ChunkRange range{};
  if (cudaError_t error = find_range(ptr, bytes, range)) return error;
  Stream* stream = find_stream(handle);
  if (!stream) return cudaErrorInvalidResourceHandle;
  if (stream->capture) {
    invalidate(stream->capture);
    return cudaErrorStreamCaptureUnsupported;
  }
  return submit(handle, cudaGraphNodeTypeEmpty, [&] {
    for (size_t i = range.first; i < range.last; ++i) {
      move_chunk(*range.allocation, i, is_host(location) ? kHost : location.id);
      range.allocation->pages->chunks[i].prefetched = location;
    }
  });
}

cudaError_t discard_batch(void** ptrs, size_t* sizes, size_t count, cudaStream_t stream) {
  for (size_t i = 0; i < count; ++i) {
    ChunkRange range{};
    if (cudaError_t error = find_range(ptrs[i], sizes[i], range)) return error;
    if (!range.allocation) continue;
    auto* const ptr = ptrs[i];
    const size_t bytes = sizes[i];
    if (auto error = submit(stream, cudaGraphNodeTypeEmpty, [=] {
          discard(range);
          zero_range(ptr, bytes);
        })) {
      return error;
    }
  }
  return cudaSuccess;
}

// With several locations, entry i holds from range index starts[i] on.
cudaError_t prefetch_batch(void** ptrs, size_t* sizes, size_t count, cudaMemLocation* locations,
                           size_t* starts, size_t location_count, cudaStream_t stream) {
  size_t which = 0;
  for (size_t i = 0; i < count; ++i) {
    while (which + 1 < location_count && starts[which + 1] <= i) ++which;
    if (auto error = prefetch(ptrs[i], sizes[i], locations[which], stream)) return error;
  }
  return cudaSuccess;
}

template <class Get>
cudaMemLocation common(const ChunkRange& range, Get get) {
  const cudaMemLocation first = get(range.allocation->pages->chunks[range.first]);
  for (size_t i = range.first; i < range.last; ++i) {
    const cudaMemLocation other = get(range.allocation->pages->chunks[i]);
    if (other.type != first.type || other.id != first.id) {
      return {cudaMemLocationTypeInvalid, kUnpopulated};
    }
  }
  return first;
}

// The older attributes answer one number: a device, cudaCpuDeviceId or cudaInvalidDeviceId.
int as_device_id(const cudaMemLocation& location) {
  if (location.type == cudaMemLocationTypeDevice) return location.id;
  return is_host(location) ? cudaCpuDeviceId : cudaInvalidDeviceId;
}

cudaError_t range_attribute(void* data, size_t size, cudaMemRangeAttribute which, const void* ptr,
                            size_t bytes) {
  const ChunkRange range = chunks_of(ptr, bytes);
  if (!range.allocation || size < sizeof(int)) return cudaErrorInvalidValue;
  const auto& chunks = range.allocation->pages->chunks;
  const auto all = [&](auto test) {
    return std::all_of(chunks.begin() + static_cast<long>(range.first),
                       chunks.begin() + static_cast<long>(range.last), test);
  };
  const auto preferred = common(range, [](const Chunk& chunk) { return chunk.preferred; });
  const auto prefetched = common(range, [](const Chunk& chunk) { return chunk.prefetched; });
  int* const out = static_cast<int*>(data);
  switch (which) {
    case cudaMemRangeAttributeReadMostly:
      *out = all([](const Chunk& chunk) { return chunk.read_mostly; });
      return cudaSuccess;
    case cudaMemRangeAttributePreferredLocation:
      *out = as_device_id(preferred);
      return cudaSuccess;
    case cudaMemRangeAttributePreferredLocationType:
      *out = preferred.type;
      return cudaSuccess;
    case cudaMemRangeAttributePreferredLocationId:
      *out = preferred.id;
      return cudaSuccess;
    case cudaMemRangeAttributeLastPrefetchLocation:
      *out = as_device_id(prefetched);
      return cudaSuccess;
    case cudaMemRangeAttributeLastPrefetchLocationType:
      *out = prefetched.type;
      return cudaSuccess;
    case cudaMemRangeAttributeLastPrefetchLocationId:
      *out = prefetched.id;
      return cudaSuccess;
    case cudaMemRangeAttributeAccessedBy: {
      size_t found = 0;
      for (int device = kHost; device < machine().devices; ++device) {
        const uint64_t bit = device < 0 ? kCpuBit : uint64_t{1} << device;
        const bool advised = all([=](const Chunk& chunk) { return chunk.accessed_by & bit; });
        if (advised && found < size / sizeof(int)) out[found++] = device;
      }
      while (found < size / sizeof(int)) out[found++] = cudaInvalidDeviceId;
      return cudaSuccess;
    }
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace
}  // namespace egm_sim

using namespace egm_sim;

extern "C" {

cudaError_t cudaMallocManaged(void** out, size_t size, unsigned flags) {
  return api("cudaMallocManaged", kUnsafeInCapture, {{"size", size}, {"flags", flags}},
             [&](Call& call) { return allocate(out, size, flags, call); });
}

cudaError_t cudaMemAdvise(const void* ptr, size_t bytes, cudaMemoryAdvise advice,
                          cudaMemLocation location) {
  const std::string where = location_text(location);
  return api("cudaMemAdvise", kUnsafeInCapture,
             {{"ptr", ptr},
              {"size", bytes},
              Arg::of_text("advice", advice_text(advice)),
              Arg::of_text("location", where.c_str())},
             [&](Call&) { return advise(ptr, bytes, advice, location); });
}

cudaError_t cudaMemPrefetchAsync(const void* ptr, size_t bytes, cudaMemLocation location,
                                 unsigned flags, cudaStream_t stream) {
  const std::string where = location_text(location);
  return api("cudaMemPrefetchAsync", kPlain,
             {{"ptr", ptr},
              {"size", bytes},
              Arg::of_text("location", where.c_str()),
              {"flags", flags},
              {"stream", stream}},
             [&](Call&) -> cudaError_t {
               if (flags != 0) return cudaErrorInvalidValue;
               return prefetch(ptr, bytes, location, stream);
             });
}

cudaError_t cudaMemPrefetchBatchAsync(void** ptrs, size_t* sizes, size_t count,
                                      cudaMemLocation* locations, size_t* starts,
                                      size_t location_count, unsigned long long,
                                      cudaStream_t stream) {
  return api("cudaMemPrefetchBatchAsync", kPlain, {{"count", count}, {"stream", stream}},
             [&](Call&) {
               return prefetch_batch(ptrs, sizes, count, locations, starts, location_count, stream);
             });
}

cudaError_t cudaMemDiscardBatchAsync(void** ptrs, size_t* sizes, size_t count, unsigned long long,
                                     cudaStream_t stream) {
  return api("cudaMemDiscardBatchAsync", kPlain, {{"count", count}, {"stream", stream}},
             [&](Call&) { return discard_batch(ptrs, sizes, count, stream); });
}

cudaError_t cudaMemDiscardAndPrefetchBatchAsync(void** ptrs, size_t* sizes, size_t count,
                                                cudaMemLocation* locations, size_t* starts,
                                                size_t location_count, unsigned long long,
                                                cudaStream_t stream) {
  return api("cudaMemDiscardAndPrefetchBatchAsync", kPlain, {{"count", count}, {"stream", stream}},
             [&](Call&) -> cudaError_t {
               if (auto error = discard_batch(ptrs, sizes, count, stream)) return error;
               return prefetch_batch(ptrs, sizes, count, locations, starts, location_count, stream);
             });
}

cudaError_t cudaMemRangeGetAttribute(void* data, size_t size, cudaMemRangeAttribute which,
                                     const void* ptr, size_t bytes) {
  return api("cudaMemRangeGetAttribute", kPlain,
             {{"ptr", ptr}, {"size", bytes}, {"attribute", which}},
             [&](Call&) { return range_attribute(data, size, which, ptr, bytes); });
}

cudaError_t cudaMemRangeGetAttributes(void** data, size_t* sizes, cudaMemRangeAttribute* which,
                                      size_t count, const void* ptr, size_t bytes) {
  return api("cudaMemRangeGetAttributes", kPlain, {{"ptr", ptr}, {"size", bytes}, {"count", count}},
             [&](Call&) -> cudaError_t {
               for (size_t i = 0; i < count; ++i) {
                 if (auto error = range_attribute(data[i], sizes[i], which[i], ptr, bytes)) {
                   return error;
                 }
               }
               return cudaSuccess;
             });
}

}  // extern "C"
