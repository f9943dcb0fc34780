// The rules of stream capture, after the CUDA Runtime API: cudaStreamBeginCapture,
// cudaStreamEndCapture and cudaThreadExchangeStreamCaptureMode.
#include <algorithm>
#include <utility>

#include "streams.h"

namespace egm_sim {
namespace {

thread_local cudaStreamCaptureMode t_mode = cudaStreamCaptureModeGlobal;

std::vector<std::shared_ptr<Capture>>& captures() {
  static auto* const underway = new std::vector<std::shared_ptr<Capture>>;
  return *underway;
}

uint64_t next_capture_id() {
  static uint64_t id = 0;
  return ++id;
}

// Whether this capture keeps the calling thread from "potentially unsafe" calls.
bool forbids(const Capture& capture) {
  if (t_mode == cudaStreamCaptureModeRelaxed) return false;
  if (capture.mode == cudaStreamCaptureModeRelaxed) return false;
  if (capture.thread == this_thread()) return true;
  return t_mode == cudaStreamCaptureModeGlobal && capture.mode == cudaStreamCaptureModeGlobal;
}

}  // namespace

void invalidate(const std::shared_ptr<Capture>& capture) { capture->invalidated = true; }

int refuse_unsafe_in_capture() {
  int result = cudaSuccess;
  for (const auto& capture : captures()) {
    if (!forbids(*capture)) continue;
    invalidate(capture);
    result = cudaErrorStreamCaptureUnsupported;
  }
  return result;
}

cudaStreamCaptureMode exchange_capture_mode(cudaStreamCaptureMode mode) {
  return std::exchange(t_mode, mode);
}

cudaError_t begin_capture(cudaStream_t handle, cudaStreamCaptureMode mode) {
  Stream* stream = find_stream(handle);
  if (!stream) return cudaErrorInvalidResourceHandle;
  if (stream->legacy) return cudaErrorStreamCaptureUnsupported;
  if (stream->capture) return cudaErrorIllegalState;
  auto capture = std::make_shared<Capture>();
  capture->id = next_capture_id();
  capture->mode = mode;
  capture->origin = stream;
  capture->thread = this_thread();
  capture->graph = std::make_unique<Graph>();
  stream->capture = capture;
  stream->last_node = nullptr;
  captures().push_back(std::move(capture));
  return cudaSuccess;
}

cudaError_t end_capture(cudaStream_t handle, Graph** graph) {
  *graph = nullptr;
  Stream* stream = find_stream(handle);
  if (!stream) return cudaErrorInvalidResourceHandle;
  const std::shared_ptr<Capture> capture = stream->capture;
  if (!capture) return cudaErrorIllegalState;
  if (capture->origin != stream) {
    invalidate(capture);
    return cudaErrorStreamCaptureUnmatched;
  }
  if (capture->mode != cudaStreamCaptureModeRelaxed && capture->thread != this_thread()) {
    return cudaErrorStreamCaptureWrongThread;
  }
  bool unjoined = false;
  for (Stream* other : streams()) {
    if (other->capture != capture) continue;
    unjoined |= std::exchange(other->unjoined, false);
    other->capture.reset();
    other->last_node = nullptr;
  }
  captures().erase(std::find(captures().begin(), captures().end(), capture));
  if (capture->invalidated) return cudaErrorStreamCaptureInvalidated;
  if (unjoined) return cudaErrorStreamCaptureUnjoined;
  *graph = capture->graph.release();
  return cudaSuccess;
}

}  // namespace egm_sim
