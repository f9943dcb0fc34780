// CUDA functions that copy and set bytes. They move the bytes at once (in a capture: at replay),
// and count as use of managed memory by the stream's device, which must have been given access to
// virtual memory.
#include <cstring>

#include "machine.h"
#include "managed.h"
#include "memory.h"
#include "streams.h"
#include "vmm.h"

namespace egm_sim {
namespace {

int device_of(cudaStream_t handle) {
  const Stream* stream = find_stream(handle);
  return stream ? stream->device : current_device();
}

// Both ends may be virtual memory in several mappings.
void move_bytes(void* to, const void* from, size_t bytes) {
  auto* target = static_cast<char*>(to);
  auto* source = const_cast<char*>(static_cast<const char*>(from));
  while (bytes > 0) {
    const View into = open_view(target, bytes);
    const View out_of = open_view(source, into.bytes);
    std::memmove(into.at, out_of.at, out_of.bytes);
    target += out_of.bytes;
    source += out_of.bytes;
    bytes -= out_of.bytes;
  }
}

void copy(void* to, const void* from, size_t bytes, int device) {
  touch(from, bytes, device);
  touch(to, bytes, device);
  move_bytes(to, from, bytes);
  hide_from_cpu(from, bytes);
  hide_from_cpu(to, bytes);
}

// A two-dimensional piece of memory; one row is one piece.
struct Rows {
  const void* at;
  size_t pitch;
  size_t width;
  size_t height;
  char* row(size_t index) const {
    return const_cast<char*>(static_cast<const char*>(at)) + index * pitch;
  }
};

void copy_rows(const Rows& to, const Rows& from, int device) {
  for (size_t i = 0; i < to.height; ++i) copy(to.row(i), from.row(i), to.width, device);
}

void fill(void* at, int value, size_t size, int device) {
  touch(at, size, device);
  size_t bytes = size;
  for (auto* next = static_cast<char*>(at); bytes > 0;) {
    const View view = open_view(next, bytes);
    if (value != 0) {
      std::memset(view.at, value, view.bytes);
    } else if (view.physical) {
      zero_physical(view.at, view.bytes);
    } else {
      zero_range(view.at, view.bytes);
    }
    next += view.bytes;
    bytes -= view.bytes;
  }
  hide_from_cpu(at, size);
}

void write_word(unsigned* at, unsigned value) {
  *reinterpret_cast<volatile unsigned*>(open_view(at, sizeof value).at) = value;
}

// Refuses what a device may not use, before anything is submitted.
cudaError_t check(const Rows& rows, int device, bool write) {
  for (size_t i = 0; i < rows.height; ++i) {
    if (!device_can_access(rows.row(i), rows.width, device, write)) return cudaErrorInvalidValue;
  }
  return cudaSuccess;
}

cudaError_t check(const void* at, size_t bytes, int device, bool write) {
  return check(Rows{at, 0, bytes, 1}, device, write);
}

cudaError_t check_copy(const void* to, int to_device, const void* from, int from_device,
                       size_t bytes) {
  if (!device_exists(to_device) || !device_exists(from_device)) return cudaErrorInvalidDevice;
  if (cudaError_t error = check(from, bytes, from_device, false)) return error;
  return check(to, bytes, to_device, true);
}

const char* kind_text(cudaMemcpyKind kind) {
  constexpr const char* kNames[] = {"host-to-host", "host-to-device", "device-to-host",
                                    "device-to-device", "default"};
  return kind <= cudaMemcpyDefault ? kNames[kind] : "invalid";
}

// The calls without a stream run on the legacy one and wait for it.
template <class Body>
cudaError_t at_once(const char* name, std::initializer_list<Arg> args, Body body) {
  return api(name, kUnsafeInCapture, args, [&](Call&) -> cudaError_t {
    Stream* legacy = find_stream(nullptr);
    if (cudaError_t error = refuse_implicit(*legacy)) return error;
    legacy->timeline->complete(legacy->timeline->submitted());
    return body();
  });
}

cudaError_t memcpy_async(cudaStream_t stream, void* to, int to_device, const void* from,
                         int from_device, size_t bytes) {
  if (cudaError_t error = check_copy(to, to_device, from, from_device, bytes)) return error;
  const int device = device_of(stream);
  return submit(stream, cudaGraphNodeTypeMemcpy, [=] { copy(to, from, bytes, device); });
}

cudaError_t memcpy_async(cudaStream_t stream, void* to, const void* from, size_t bytes) {
  return memcpy_async(stream, to, device_of(stream), from, device_of(stream), bytes);
}

cudaError_t memcpy_at_once(void* to, int to_device, const void* from, int from_device,
                           size_t bytes) {
  if (cudaError_t error = check_copy(to, to_device, from, from_device, bytes)) return error;
  copy(to, from, bytes, to_device);
  return cudaSuccess;
}

cudaError_t check_rows(const Rows& to, const Rows& from, int device) {
  if (cudaError_t error = check(from, device, false)) return error;
  return check(to, device, true);
}

}  // namespace
}  // namespace egm_sim

using namespace egm_sim;

extern "C" {

cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind kind) {
  return at_once(
      "cudaMemcpy",
      {{"dst", to}, {"src", from}, {"size", bytes}, Arg::of_text("kind", kind_text(kind))},
      [&] { return memcpy_at_once(to, current_device(), from, current_device(), bytes); });
}

cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind,
                            cudaStream_t stream) {
  return api("cudaMemcpyAsync", kPlain,
             {{"dst", to},
              {"src", from},
              {"size", bytes},
              Arg::of_text("kind", kind_text(kind)),
              {"stream", stream}},
             [&](Call&) { return memcpy_async(stream, to, from, bytes); });
}

cudaError_t cudaMemcpyPeer(void* to, int to_device, const void* from, int from_device,
                           size_t bytes) {
  return at_once("cudaMemcpyPeer",
                 {{"dst", to},
                  {"dst_device", to_device},
                  {"src", from},
                  {"src_device", from_device},
                  {"size", bytes}},
                 [&] { return memcpy_at_once(to, to_device, from, from_device, bytes); });
}

cudaError_t cudaMemcpyPeerAsync(void* to, int to_device, const void* from, int from_device,
                                size_t bytes, cudaStream_t stream) {
  return api("cudaMemcpyPeerAsync", kPlain,
             {{"dst", to},
              {"dst_device", to_device},
              {"src", from},
              {"src_device", from_device},
              {"size", bytes},
              {"stream", stream}},
             [&](Call&) { return memcpy_async(stream, to, to_device, from, from_device, bytes); });
}

cudaError_t cudaMemcpy2D(void* to, size_t to_pitch, const void* from, size_t from_pitch,
                         size_t width, size_t height, cudaMemcpyKind) {
  return at_once("cudaMemcpy2D", {{"dst", to}, {"src", from}, {"width", width}, {"height", height}},
                 [&]() -> cudaError_t {
                   const Rows target{to, to_pitch, width, height},
                       source{from, from_pitch, width, height};
                   if (cudaError_t error = check_rows(target, source, current_device()))
                     return error;
                   copy_rows(target, source, current_device());
                   return cudaSuccess;
                 });
}

cudaError_t cudaMemcpy2DAsync(void* to, size_t to_pitch, const void* from, size_t from_pitch,
                              size_t width, size_t height, cudaMemcpyKind, cudaStream_t stream) {
  return api("cudaMemcpy2DAsync", kPlain,
             {{"dst", to}, {"src", from}, {"width", width}, {"height", height}, {"stream", stream}},
             [&](Call&) -> cudaError_t {
               const int device = device_of(stream);
               const Rows target{to, to_pitch, width, height};
               const Rows source{from, from_pitch, width, height};
               if (cudaError_t error = check_rows(target, source, device)) return error;
               return submit(stream, cudaGraphNodeTypeMemcpy,
                             [=] { copy_rows(target, source, device); });
             });
}

cudaError_t cudaMemcpyBatchAsync(void* const* to, const void* const* from, const size_t* sizes,
                                 size_t count, cudaMemcpyAttributes*, size_t*, size_t,
                                 cudaStream_t stream) {
  return api("cudaMemcpyBatchAsync", kPlain, {{"count", count}, {"stream", stream}},
             [&](Call&) -> cudaError_t {
               for (size_t i = 0; i < count; ++i) {
                 if (auto error = memcpy_async(stream, to[i], from[i], sizes[i])) return error;
               }
               return cudaSuccess;
             });
}

cudaError_t cudaMemset(void* at, int value, size_t bytes) {
  return at_once("cudaMemset", {{"ptr", at}, {"value", value}, {"size", bytes}},
                 [&]() -> cudaError_t {
                   const int device = current_device();
                   if (cudaError_t error = check(at, bytes, device, true)) return error;
                   fill(at, value, bytes, device);
                   return cudaSuccess;
                 });
}

cudaError_t cudaMemsetAsync(void* at, int value, size_t bytes, cudaStream_t stream) {
  return api("cudaMemsetAsync", kPlain,
             {{"ptr", at}, {"value", value}, {"size", bytes}, {"stream", stream}},
             [&](Call&) -> cudaError_t {
               const int device = device_of(stream);
               if (cudaError_t error = check(at, bytes, device, true)) return error;
               return submit(stream, cudaGraphNodeTypeMemset,
                             [=] { fill(at, value, bytes, device); });
             });
}

CUresult cuMemsetD32Async(CUdeviceptr at, unsigned value, size_t count, CUstream stream) {
  return api<CUresult>("cuMemsetD32Async", kPlain,
                       {{"ptr", at}, {"value", value}, {"count", count}, {"stream", stream}},
                       [&](Call&) -> cudaError_t {
                         auto* words = reinterpret_cast<unsigned*>(at);
                         const int device = device_of(stream);
                         const size_t bytes = count * sizeof value;
                         if (cudaError_t error = check(words, bytes, device, true)) return error;
                         return submit(stream, cudaGraphNodeTypeMemset, [=] {
                           touch(words, bytes, device);
                           for (size_t i = 0; i < count; ++i) write_word(words + i, value);
                           hide_from_cpu(words, bytes);
                         });
                       });
}

CUresult cuStreamWriteValue32(CUstream stream, CUdeviceptr at, cuuint32_t value, unsigned) {
  return api<CUresult>(
      "cuStreamWriteValue32", kPlain, {{"stream", stream}, {"ptr", at}, {"value", value}},
      [&](Call&) -> cudaError_t {
        auto* word = reinterpret_cast<unsigned*>(at);
        if (cudaError_t error = check(word, sizeof value, device_of(stream), true)) return error;
        return submit(stream, cudaGraphNodeTypeEmpty, [=] { write_word(word, value); });
      });
}

}  // extern "C"
