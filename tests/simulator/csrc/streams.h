// Streams, events and captures: what was submitted where, what counts as finished, and which calls
// a capture forbids. Callers hold the lock.
//
// Work is done the moment it is submitted; a Timeline only decides when it is *reported* as done.
// Held timelines (see hold) report work as pending until released or synchronised.
#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <unordered_map>
#include <vector>

#include "api.h"

namespace egm_sim {

class Timeline {
 public:
  // A ticket for one more piece of work.
  uint64_t submit() { return ++submitted_; }
  uint64_t submitted() const { return submitted_; }
  // Work from now on also needs `ticket` of `other`.
  void wait_for(const std::shared_ptr<Timeline>& other, uint64_t ticket);
  bool done(uint64_t ticket);
  // Somebody waits for it: everything up to the ticket is done.
  void complete(uint64_t ticket);
  // Holds what is submitted from now on; what was before is done.
  void hold(bool on);

 private:
  struct Wait {
    uint64_t after;  // work with a larger ticket waits
    std::shared_ptr<Timeline> other;
    uint64_t ticket;
  };
  uint64_t submitted_ = 0;
  uint64_t completed_ = 0;
  bool held_ = false;
  std::vector<Wait> waits_;
};

// A graph is the list of its actions in the order of capture.
struct GraphNode {
  cudaGraphNodeType type;
  std::function<void()> action;  // empty for kernels: they do nothing
  GraphNode* after;
};
struct UserObject {
  void* object;
  cudaHostFn_t destroy;
  unsigned references;
};
struct Graph {
  std::vector<std::shared_ptr<GraphNode>> nodes;
  std::vector<std::pair<UserObject*, unsigned>> retained;
};

struct Stream;
struct Capture {
  uint64_t id;
  cudaStreamCaptureMode mode;
  Stream* origin;
  long thread;
  std::unique_ptr<Graph> graph;
  bool invalidated = false;
};

struct Stream {
  Stream(int device, unsigned flags, int priority, uint64_t id)
      : device(device), flags(flags), priority(priority), id(id) {}
  int device;
  unsigned flags;
  int priority;
  uint64_t id;
  bool legacy = false;
  std::shared_ptr<Timeline> timeline = std::make_shared<Timeline>();
  std::shared_ptr<Capture> capture;
  GraphNode* last_node = nullptr;
  // Of a stream that joined a capture: it has work that the origin has not waited for.
  bool unjoined = false;
};

struct Event {
  unsigned flags = 0;
  bool recorded = false;
  std::shared_ptr<Timeline> timeline;
  cudaStream_t stream = nullptr;  // of the last record
  uint64_t ticket = 0;
  std::chrono::steady_clock::time_point when;
  std::shared_ptr<Capture> capture;
  Stream* captured_on = nullptr;
  GraphNode* captured_after = nullptr;
};

Stream* find_stream(cudaStream_t handle);
// Every live stream, the legacy ones included.
const std::vector<Stream*>& streams();
Stream* create_stream(int device, unsigned flags, int priority);
void destroy_stream(Stream* stream);
Event* find_event(cudaEvent_t handle);
void complete_device(int device);
// Memory went away from devices without a wait of CUDA's own: counts it if a stream has work
// pending.
void note_unmapping();
long unmapped_while_busy();
void forget_unmappings();
// A handle of nullptr with `all` means every stream, present and future.
bool hold_stream(cudaStream_t handle, bool all, bool on);

// Submits work: does it now, or adds it to the capture underway on the stream.
cudaError_t submit(cudaStream_t stream, cudaGraphNodeType type, std::function<void()> action);

// The check behind kUnsafeInCapture, and the modes of threads.
int refuse_unsafe_in_capture();
cudaStreamCaptureMode exchange_capture_mode(cudaStreamCaptureMode mode);
cudaError_t begin_capture(cudaStream_t stream, cudaStreamCaptureMode mode);
cudaError_t end_capture(cudaStream_t stream, Graph** graph);
void invalidate(const std::shared_ptr<Capture>& capture);
// cudaErrorStreamCaptureImplicit if `stream` is the legacy one and a blocking stream captures.
cudaError_t refuse_implicit(const Stream& stream);
long this_thread();

}  // namespace egm_sim
