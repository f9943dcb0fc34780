// Timelines, the books of streams and events, and submission of work.
#include "streams.h"

#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>

#include "machine.h"

namespace egm_sim {
namespace {

struct Work {
  std::vector<Stream*> streams;
  std::unordered_map<cudaStream_t, Stream*> by_handle;
  std::vector<Stream*> legacy;      // one a device
  std::vector<Stream*> per_thread;  // one a device; threads share it
  bool hold_all = false;
  long unmapped_while_busy = 0;
  uint64_t next_id = 0;
};

Work& work() {
  static Work* const instance = new Work;
  return *instance;
}

Stream* special(std::vector<Stream*>& made, bool legacy) {
  made.resize(static_cast<size_t>(machine().devices));
  Stream*& stream = made[current_device()];
  if (!stream) {
    stream = create_stream(current_device(), 0, 0);
    stream->legacy = legacy;
  }
  return stream;
}

}  // namespace

void Timeline::wait_for(const std::shared_ptr<Timeline>& other, uint64_t ticket) {
  if (other.get() == this || other->done(ticket)) return;
  waits_.push_back({submitted_, other, ticket});
}

bool Timeline::done(uint64_t ticket) {
  if (ticket <= completed_) return true;
  if (held_) return false;
  for (const Wait& wait : waits_) {
    if (wait.after < ticket && !wait.other->done(wait.ticket)) return false;
  }
  complete(ticket);
  return true;
}

void Timeline::complete(uint64_t ticket) {
  if (ticket <= completed_) return;
  completed_ = ticket;
  std::vector<Wait> due;
  const auto rest = std::partition(waits_.begin(), waits_.end(),
                                   [&](const Wait& wait) { return wait.after >= ticket; });
  due.assign(rest, waits_.end());
  waits_.erase(rest, waits_.end());
  for (const Wait& wait : due) wait.other->complete(wait.ticket);
}

void Timeline::hold(bool on) {
  if (on && !held_) done(submitted_);
  held_ = on;
}

long this_thread() {
  thread_local const long id = syscall(SYS_gettid);
  return id;
}

Stream* create_stream(int device, unsigned flags, int priority) {
  Work& w = work();
  auto* stream = new Stream(device, flags, priority, ++w.next_id);
  stream->timeline->hold(w.hold_all);
  w.streams.push_back(stream);
  w.by_handle[reinterpret_cast<cudaStream_t>(stream)] = stream;
  return stream;
}

void destroy_stream(Stream* stream) {
  Work& w = work();
  if (stream->capture) invalidate(stream->capture);
  stream->timeline->hold(false);
  w.streams.erase(std::find(w.streams.begin(), w.streams.end(), stream));
  w.by_handle.erase(reinterpret_cast<cudaStream_t>(stream));
  delete stream;
}

Stream* find_stream(cudaStream_t handle) {
  if (handle == nullptr || handle == cudaStreamLegacy) return special(work().legacy, true);
  if (handle == cudaStreamPerThread) return special(work().per_thread, false);
  const auto found = work().by_handle.find(handle);
  return found == work().by_handle.end() ? nullptr : found->second;
}

const std::vector<Stream*>& streams() { return work().streams; }

void complete_device(int device) {
  for (Stream* stream : work().streams) {
    if (stream->device == device) stream->timeline->complete(stream->timeline->submitted());
  }
}

void note_unmapping() {
  const auto busy = [](Stream* stream) {
    return !stream->timeline->done(stream->timeline->submitted());
  };
  Work& w = work();
  if (std::any_of(w.streams.begin(), w.streams.end(), busy)) ++w.unmapped_while_busy;
}

long unmapped_while_busy() { return work().unmapped_while_busy; }
void forget_unmappings() { work().unmapped_while_busy = 0; }

bool hold_stream(cudaStream_t handle, bool all, bool on) {
  if (!all) {
    Stream* stream = find_stream(handle);
    if (stream) stream->timeline->hold(on);
    return stream != nullptr;
  }
  work().hold_all = on;
  for (Stream* stream : work().streams) stream->timeline->hold(on);
  return true;
}

cudaError_t refuse_implicit(const Stream& stream) {
  if (!stream.legacy) return cudaSuccess;
  cudaError_t result = cudaSuccess;
  for (Stream* other : work().streams) {
    if (!other->capture || other->flags & cudaStreamNonBlocking) continue;
    if (other->device != stream.device || other == &stream) continue;
    invalidate(other->capture);
    result = cudaErrorStreamCaptureImplicit;
  }
  return result;
}

cudaError_t submit(cudaStream_t handle, cudaGraphNodeType type, std::function<void()> action) {
  Stream* stream = find_stream(handle);
  if (!stream) return cudaErrorInvalidResourceHandle;
  if (stream->capture) {
    if (stream->capture->invalidated) return cudaErrorStreamCaptureInvalidated;
    auto& nodes = stream->capture->graph->nodes;
    nodes.push_back(
        std::make_shared<GraphNode>(GraphNode{type, std::move(action), stream->last_node}));
    stream->last_node = nodes.back().get();
    stream->unjoined = stream != stream->capture->origin;
    return cudaSuccess;
  }
  if (cudaError_t error = refuse_implicit(*stream)) return error;
  stream->timeline->submit();
  if (action) action();
  return cudaSuccess;
}

}  // namespace egm_sim
