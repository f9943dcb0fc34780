// CUDA functions that copy and set bytes. They move the bytes at once (in a capture: at replay),
// and count as use of managed memory by the stream's device.
#include <cstring>

#include "managed.h"
#include "memory.h"
#include "streams.h"

namespace egm_sim {
namespace {

int device_of(cudaStream_t handle) {
  const Stream* stream = find_stream(handle);
  return stream ? stream->device : current_device();
}

void copy(void* to, const void* from, size_t bytes, int device) {
  touch(from, bytes, device);
  touch(to, bytes, device);
  std::memmove(to, from, bytes);
  hide_from_cpu(from, bytes);
  hide_from_cpu(to, bytes);
}

void copy_rows(void* to, size_t to_pitch, const void* from, size_t from_pitch, size_t width,
               size_t height, int device) {
  for (size_t row = 0; row < height; ++row) {
    copy(static_cast<char*>(to) + row * to_pitch, static_cast<const char*>(from) + row * from_pitch,
         width, device);
  }
}

void fill(void* at, int value, size_t bytes, int device) {
  touch(at, bytes, device);
  if (value == 0) {
    zero_range(at, bytes);
  } else {
    std::memset(at, value, bytes);
  }
  hide_from_cpu(at, bytes);
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
    body();
    return cudaSuccess;
  });
}

cudaError_t memcpy_async(cudaStream_t stream, void* to, const void* from, size_t bytes) {
  const int device = device_of(stream);
  return submit(stream, cudaGraphNodeTypeMemcpy, [=] { copy(to, from, bytes, device); });
}

}  // namespace
}  // namespace egm_sim

using namespace egm_sim;

extern "C" {

cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind kind) {
  return at_once(
      "cudaMemcpy",
      {{"dst", to}, {"src", from}, {"size", bytes}, Arg::of_text("kind", kind_text(kind))},
      [&] { copy(to, from, bytes, current_device()); });
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
                 [&] { copy(to, from, bytes, to_device); });
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
             [&](Call&) { return memcpy_async(stream, to, from, bytes); });
}

cudaError_t cudaMemcpy2D(void* to, size_t to_pitch, const void* from, size_t from_pitch,
                         size_t width, size_t height, cudaMemcpyKind) {
  return at_once(
      "cudaMemcpy2D", {{"dst", to}, {"src", from}, {"width", width}, {"height", height}},
      [&] { copy_rows(to, to_pitch, from, from_pitch, width, height, current_device()); });
}

cudaError_t cudaMemcpy2DAsync(void* to, size_t to_pitch, const void* from, size_t from_pitch,
                              size_t width, size_t height, cudaMemcpyKind, cudaStream_t stream) {
  return api("cudaMemcpy2DAsync", kPlain,
             {{"dst", to}, {"src", from}, {"width", width}, {"height", height}, {"stream", stream}},
             [&](Call&) {
               const int device = device_of(stream);
               return submit(stream, cudaGraphNodeTypeMemcpy, [=] {
                 copy_rows(to, to_pitch, from, from_pitch, width, height, device);
               });
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
                 [&] { fill(at, value, bytes, current_device()); });
}

cudaError_t cudaMemsetAsync(void* at, int value, size_t bytes, cudaStream_t stream) {
  return api("cudaMemsetAsync", kPlain,
             {{"ptr", at}, {"value", value}, {"size", bytes}, {"stream", stream}}, [&](Call&) {
               const int device = device_of(stream);
               return submit(stream, cudaGraphNodeTypeMemset,
                             [=] { fill(at, value, bytes, device); });
             });
}

CUresult cuMemsetD32Async(CUdeviceptr at, unsigned value, size_t count, CUstream stream) {
  return api<CUresult>("cuMemsetD32Async", kPlain,
                       {{"ptr", at}, {"value", value}, {"count", count}, {"stream", stream}},
                       [&](Call&) {
                         auto* words = reinterpret_cast<unsigned*>(at);
                         const int device = device_of(stream);
                         return submit(stream, cudaGraphNodeTypeMemset, [=] {
                           touch(words, count * sizeof value, device);
                           for (size_t i = 0; i < count; ++i) words[i] = value;
                           hide_from_cpu(words, count * sizeof value);
                         });
                       });
}

CUresult cuStreamWriteValue32(CUstream stream, CUdeviceptr at, cuuint32_t value, unsigned) {
  return api<CUresult>("cuStreamWriteValue32", kPlain,
                       {{"stream", stream}, {"ptr", at}, {"value", value}}, [&](Call&) {
                         return submit(stream, cudaGraphNodeTypeEmpty, [=] {
                           *reinterpret_cast<volatile cuuint32_t*>(at) = value;
                         });
                       });
}

}  // extern "C"
