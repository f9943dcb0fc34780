// CUDA functions on streams and events.
#include <chrono>
#include <unordered_set>

#include "machine.h"
#include "streams.h"

namespace egm_sim {
namespace {

std::unordered_set<Event*>& events() {
  static auto* const live = new std::unordered_set<Event*>;
  return *live;
}

cudaError_t create_event(cudaEvent_t* out, unsigned flags) {
  auto* event = new Event;
  event->flags = flags;
  events().insert(event);
  *out = reinterpret_cast<cudaEvent_t>(event);
  return cudaSuccess;
}

cudaError_t record(cudaEvent_t handle, cudaStream_t stream_handle, unsigned flags) {
  Event* event = find_event(handle);
  Stream* stream = find_stream(stream_handle);
  if (!event || !stream) return cudaErrorInvalidResourceHandle;
  if (stream->capture) {
    if (stream->capture->invalidated) return cudaErrorStreamCaptureInvalidated;
    if (flags & cudaEventRecordExternal) {
      return submit(stream_handle, cudaGraphNodeTypeEventRecord, nullptr);
    }
    event->capture = stream->capture;
    event->captured_on = stream;
    event->captured_after = stream->last_node;
    event->recorded = true;
    return cudaSuccess;
  }
  if (cudaError_t error = refuse_implicit(*stream)) return error;
  event->capture.reset();
  event->recorded = true;
  event->timeline = stream->timeline;
  event->stream = stream_handle;
  event->ticket = stream->timeline->submit();
  event->when = std::chrono::steady_clock::now();
  return cudaSuccess;
}

// A stream that waits for a captured event joins that capture.
cudaError_t wait_in_capture(Stream& stream, const Event& event, unsigned flags) {
  if (stream.capture && stream.capture->invalidated) return cudaErrorStreamCaptureInvalidated;
  if (!event.capture) {
    if (flags & cudaEventWaitExternal || !event.recorded) return cudaSuccess;
    invalidate(stream.capture);
    return cudaErrorStreamCaptureIsolation;
  }
  if (stream.capture && stream.capture != event.capture) {
    invalidate(stream.capture);
    invalidate(event.capture);
    return cudaErrorStreamCaptureMerge;
  }
  if (!event.capture->graph) return cudaErrorCapturedEvent;
  if (!stream.capture) {
    stream.capture = event.capture;
    stream.unjoined = &stream != event.capture->origin;
  }
  stream.last_node = event.captured_after;
  // A stream whose last work this event covers counts as joined.
  Stream* other = event.captured_on;
  if (other != &stream && other->last_node == event.captured_after) other->unjoined = false;
  return cudaSuccess;
}

cudaError_t wait(cudaStream_t stream_handle, cudaEvent_t handle, unsigned flags) {
  Event* event = find_event(handle);
  Stream* stream = find_stream(stream_handle);
  if (!event || !stream) return cudaErrorInvalidResourceHandle;
  if (stream->capture || event->capture) return wait_in_capture(*stream, *event, flags);
  if (cudaError_t error = refuse_implicit(*stream)) return error;
  if (event->timeline) stream->timeline->wait_for(event->timeline, event->ticket);
  return cudaSuccess;
}

// What asking about an event or stream means while something captures.
cudaError_t refuse_query(const std::shared_ptr<Capture>& capture, cudaError_t error) {
  if (capture) {
    invalidate(capture);
    return error;
  }
  return static_cast<cudaError_t>(refuse_unsafe_in_capture());
}

template <class Body>
cudaError_t on_event(const char* name, unsigned traits, cudaEvent_t handle, Body body) {
  return api(name, traits, {{"event", handle}}, [&](Call& call) -> cudaError_t {
    Event* event = find_event(handle);
    if (!event) return cudaErrorInvalidResourceHandle;
    if (event->timeline) call.note({"stream", event->stream});
    return body(*event);
  });
}

template <class Body>
cudaError_t on_stream(const char* name, unsigned traits, cudaStream_t handle, Body body) {
  return api(name, traits, {{"stream", handle}}, [&](Call&) -> cudaError_t {
    Stream* stream = find_stream(handle);
    return stream ? body(*stream) : cudaErrorInvalidResourceHandle;
  });
}

cudaError_t make_stream(const char* name, cudaStream_t* out, unsigned flags, int priority) {
  return api(name, kPlain, {{"flags", flags}, {"priority", priority}}, [&](Call& call) {
    *out = reinterpret_cast<cudaStream_t>(create_stream(current_device(), flags, priority));
    call.note({"stream", *out});
    return cudaSuccess;
  });
}

}  // namespace

Event* find_event(cudaEvent_t handle) {
  auto* event = reinterpret_cast<Event*>(handle);
  return events().count(event) ? event : nullptr;
}

}  // namespace egm_sim

using namespace egm_sim;

extern "C" {

cudaError_t cudaStreamCreate(cudaStream_t* out) {
  return make_stream("cudaStreamCreate", out, cudaStreamDefault, 0);
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* out, unsigned flags) {
  return make_stream("cudaStreamCreateWithFlags", out, flags, 0);
}

cudaError_t cudaStreamCreateWithPriority(cudaStream_t* out, unsigned flags, int priority) {
  return make_stream("cudaStreamCreateWithPriority", out, flags, priority);
}

cudaError_t cudaStreamDestroy(cudaStream_t handle) {
  return on_stream("cudaStreamDestroy", kPlain, handle, [&](Stream& stream) {
    if (handle == nullptr || stream.legacy) return cudaErrorInvalidResourceHandle;
    destroy_stream(&stream);
    return cudaSuccess;
  });
}

cudaError_t cudaStreamQuery(cudaStream_t handle) {
  return on_stream("cudaStreamQuery", kPlain, handle, [&](Stream& stream) {
    if (auto error = refuse_query(stream.capture, cudaErrorStreamCaptureUnsupported)) return error;
    if (auto error = refuse_implicit(stream)) return error;
    Timeline& timeline = *stream.timeline;
    return timeline.done(timeline.submitted()) ? cudaSuccess : cudaErrorNotReady;
  });
}

cudaError_t cudaStreamSynchronize(cudaStream_t handle) {
  return on_stream("cudaStreamSynchronize", kPlain, handle, [&](Stream& stream) {
    if (auto error = refuse_query(stream.capture, cudaErrorStreamCaptureUnsupported)) return error;
    if (auto error = refuse_implicit(stream)) return error;
    stream.timeline->complete(stream.timeline->submitted());
    return cudaSuccess;
  });
}

cudaError_t cudaStreamGetPriority(cudaStream_t handle, int* priority) {
  return on_stream("cudaStreamGetPriority", kQuiet, handle, [&](Stream& stream) {
    *priority = stream.priority;
    return cudaSuccess;
  });
}

cudaError_t cudaStreamGetFlags(cudaStream_t handle, unsigned* flags) {
  return on_stream("cudaStreamGetFlags", kQuiet, handle, [&](Stream& stream) {
    *flags = stream.flags;
    return cudaSuccess;
  });
}

cudaError_t cudaStreamGetId(cudaStream_t handle, unsigned long long* id) {
  return on_stream("cudaStreamGetId", kQuiet, handle, [&](Stream& stream) {
    *id = stream.id;
    return cudaSuccess;
  });
}

cudaError_t cudaStreamGetDevice(cudaStream_t handle, int* device) {
  return on_stream("cudaStreamGetDevice", kQuiet, handle, [&](Stream& stream) {
    *device = stream.device;
    return cudaSuccess;
  });
}

cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned flags) {
  return api("cudaStreamWaitEvent", kPlain, {{"stream", stream}, {"event", event}},
             [&](Call&) { return wait(stream, event, flags); });
}

cudaError_t cudaStreamAttachMemAsync(cudaStream_t stream, void* ptr, size_t length,
                                     unsigned flags) {
  return api("cudaStreamAttachMemAsync", kPlain,
             {{"stream", stream}, {"ptr", ptr}, {"size", length}, {"flags", flags}},
             [&](Call&) { return submit(stream, cudaGraphNodeTypeEmpty, nullptr); });
}

cudaError_t cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t callback, void* data) {
  return api("cudaLaunchHostFunc", kPlain, {{"stream", stream}}, [&](Call&) {
    return submit(stream, cudaGraphNodeTypeHost, [=] { run_unlocked([=] { callback(data); }); });
  });
}

cudaError_t cudaStreamAddCallback(cudaStream_t stream, cudaStreamCallback_t callback, void* data,
                                  unsigned) {
  return api("cudaStreamAddCallback", kPlain, {{"stream", stream}}, [&](Call&) {
    return submit(stream, cudaGraphNodeTypeHost,
                  [=] { run_unlocked([=] { callback(stream, cudaSuccess, data); }); });
  });
}

cudaError_t cudaEventCreate(cudaEvent_t* out) {
  return api("cudaEventCreate", kPlain, {}, [&](Call& call) {
    const cudaError_t result = create_event(out, cudaEventDefault);
    call.note({"event", *out});
    return result;
  });
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* out, unsigned flags) {
  return api("cudaEventCreateWithFlags", kPlain, {{"flags", flags}}, [&](Call& call) {
    const cudaError_t result = create_event(out, flags);
    call.note({"event", *out});
    return result;
  });
}

cudaError_t cudaEventDestroy(cudaEvent_t handle) {
  return on_event("cudaEventDestroy", kPlain, handle, [](Event& event) {
    events().erase(&event);
    delete &event;
    return cudaSuccess;
  });
}

cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  return api("cudaEventRecord", kPlain, {{"event", event}, {"stream", stream}},
             [&](Call&) { return record(event, stream, 0); });
}

cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned flags) {
  return api("cudaEventRecordWithFlags", kPlain,
             {{"event", event}, {"stream", stream}, {"flags", flags}},
             [&](Call&) { return record(event, stream, flags); });
}

cudaError_t cudaEventQuery(cudaEvent_t handle) {
  return on_event("cudaEventQuery", kPlain, handle, [](Event& event) {
    if (auto error = refuse_query(event.capture, cudaErrorCapturedEvent)) return error;
    if (!event.timeline || event.timeline->done(event.ticket)) return cudaSuccess;
    return cudaErrorNotReady;
  });
}

cudaError_t cudaEventSynchronize(cudaEvent_t handle) {
  return on_event("cudaEventSynchronize", kPlain, handle, [](Event& event) {
    if (auto error = refuse_query(event.capture, cudaErrorCapturedEvent)) return error;
    if (event.timeline) event.timeline->complete(event.ticket);
    return cudaSuccess;
  });
}

cudaError_t cudaEventElapsedTime(float* ms, cudaEvent_t start, cudaEvent_t end) {
  return api(
      "cudaEventElapsedTime", kPlain, {{"start", start}, {"end", end}}, [&](Call&) -> cudaError_t {
        Event* first = find_event(start);
        Event* second = find_event(end);
        if (!first || !second || !first->timeline || !second->timeline) {
          return cudaErrorInvalidResourceHandle;
        }
        if ((first->flags | second->flags) & cudaEventDisableTiming) {
          return cudaErrorInvalidResourceHandle;
        }
        if (!first->timeline->done(first->ticket) || !second->timeline->done(second->ticket)) {
          return cudaErrorNotReady;
        }
        *ms = std::chrono::duration<float, std::milli>(second->when - first->when).count();
        return cudaSuccess;
      });
}

}  // extern "C"
