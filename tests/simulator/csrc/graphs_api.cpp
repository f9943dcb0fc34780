// CUDA functions on captures and graphs. A graph replays the copies, memsets and host callbacks it
// captured; its kernels do nothing.
#include <algorithm>

#include "machine.h"
#include "streams.h"

namespace egm_sim {
namespace {

using Nodes = std::vector<std::shared_ptr<GraphNode>>;

void drop(UserObject* object, unsigned count) {
  object->references -= count;
  if (object->references > 0) return;
  run_unlocked([destroy = object->destroy, data = object->object] { destroy(data); });
  delete object;
}

cudaError_t instantiate(cudaGraphExec_t* out, cudaGraph_t graph) {
  if (!graph) return cudaErrorInvalidValue;
  *out = reinterpret_cast<cudaGraphExec_t>(new Nodes(reinterpret_cast<Graph*>(graph)->nodes));
  return cudaSuccess;
}

cudaError_t capture_info(cudaStream_t handle, cudaStreamCaptureStatus* status,
                         unsigned long long* id, cudaGraph_t* graph,
                         const cudaGraphNode_t** dependencies, const cudaGraphEdgeData** edges,
                         size_t* count) {
  Stream* stream = find_stream(handle);
  if (!stream) return cudaErrorInvalidResourceHandle;
  if (!stream->capture) {
    if (cudaError_t error = refuse_implicit(*stream)) return error;
    *status = cudaStreamCaptureStatusNone;
    return cudaSuccess;
  }
  const Capture& capture = *stream->capture;
  *status =
      capture.invalidated ? cudaStreamCaptureStatusInvalidated : cudaStreamCaptureStatusActive;
  if (id) *id = capture.id;
  if (graph) *graph = reinterpret_cast<cudaGraph_t>(capture.graph.get());
  if (dependencies) *dependencies = reinterpret_cast<const cudaGraphNode_t*>(&stream->last_node);
  if (edges) *edges = nullptr;
  if (count) *count = stream->last_node ? 1 : 0;
  return cudaSuccess;
}

}  // namespace
}  // namespace egm_sim

using namespace egm_sim;

extern "C" {

cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  return api("cudaThreadExchangeStreamCaptureMode", kPlain, {{"mode", *mode}}, [&](Call&) {
    *mode = exchange_capture_mode(*mode);
    return cudaSuccess;
  });
}

cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode mode) {
  return api("cudaStreamBeginCapture", kPlain, {{"stream", stream}, {"mode", mode}},
             [&](Call&) { return begin_capture(stream, mode); });
}

cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* out) {
  return api("cudaStreamEndCapture", kPlain, {{"stream", stream}}, [&](Call&) {
    Graph* graph = nullptr;
    const cudaError_t result = end_capture(stream, &graph);
    *out = reinterpret_cast<cudaGraph_t>(graph);
    return result;
  });
}

cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status) {
  return api("cudaStreamIsCapturing", kQuiet, {{"stream", stream}}, [&](Call&) {
    return capture_info(stream, status, nullptr, nullptr, nullptr, nullptr, nullptr);
  });
}

cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, cudaStreamCaptureStatus* status,
                                     unsigned long long* id, cudaGraph_t* graph,
                                     const cudaGraphNode_t** dependencies,
                                     const cudaGraphEdgeData** edges, size_t* count) {
  return api("cudaStreamGetCaptureInfo", kQuiet, {{"stream", stream}}, [&](Call&) {
    return capture_info(stream, status, id, graph, dependencies, edges, count);
  });
}

cudaError_t cudaGraphInstantiate(cudaGraphExec_t* out, cudaGraph_t graph,
                                 unsigned long long flags) {
  return api("cudaGraphInstantiate", kPlain, {{"graph", graph}, {"flags", flags}},
             [&](Call&) { return instantiate(out, graph); });
}

cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t* out, cudaGraph_t graph,
                                          unsigned long long flags) {
  return api("cudaGraphInstantiateWithFlags", kPlain, {{"graph", graph}, {"flags", flags}},
             [&](Call&) { return instantiate(out, graph); });
}

cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t stream) {
  return api("cudaGraphLaunch", kPlain, {{"exec", exec}, {"stream", stream}}, [&](Call&) {
    const Nodes nodes = *reinterpret_cast<Nodes*>(exec);
    return submit(stream, cudaGraphNodeTypeGraph, [nodes] {
      for (const auto& node : nodes) {
        if (node->action) node->action();
      }
    });
  });
}

cudaError_t cudaGraphUpload(cudaGraphExec_t exec, cudaStream_t stream) {
  return api("cudaGraphUpload", kPlain, {{"exec", exec}, {"stream", stream}},
             [&](Call&) { return submit(stream, cudaGraphNodeTypeEmpty, nullptr); });
}

cudaError_t cudaGraphExecDestroy(cudaGraphExec_t exec) {
  return api("cudaGraphExecDestroy", kPlain, {{"exec", exec}}, [&](Call&) {
    delete reinterpret_cast<Nodes*>(exec);
    return cudaSuccess;
  });
}

cudaError_t cudaGraphDestroy(cudaGraph_t handle) {
  return api("cudaGraphDestroy", kPlain, {{"graph", handle}}, [&](Call&) {
    auto* graph = reinterpret_cast<Graph*>(handle);
    for (const auto& [object, count] : graph->retained) drop(object, count);
    delete graph;
    return cudaSuccess;
  });
}

cudaError_t cudaGraphGetNodes(cudaGraph_t handle, cudaGraphNode_t* nodes, size_t* count) {
  return api("cudaGraphGetNodes", kPlain, {{"graph", handle}}, [&](Call&) {
    const auto* graph = reinterpret_cast<Graph*>(handle);
    if (nodes) {
      *count = std::min(*count, graph->nodes.size());
      for (size_t i = 0; i < *count; ++i) {
        nodes[i] = reinterpret_cast<cudaGraphNode_t>(graph->nodes[i].get());
      }
    } else {
      *count = graph->nodes.size();
    }
    return cudaSuccess;
  });
}

cudaError_t cudaGraphNodeGetType(cudaGraphNode_t node, cudaGraphNodeType* type) {
  return api("cudaGraphNodeGetType", kPlain, {{"node", node}}, [&](Call&) {
    *type = reinterpret_cast<GraphNode*>(node)->type;
    return cudaSuccess;
  });
}

cudaError_t cudaGraphNodeGetDependencies(cudaGraphNode_t handle, cudaGraphNode_t* dependencies,
                                         cudaGraphEdgeData* edges, size_t* count) {
  return api("cudaGraphNodeGetDependencies", kPlain, {{"node", handle}}, [&](Call&) {
    GraphNode* after = reinterpret_cast<GraphNode*>(handle)->after;
    if (dependencies && *count > 0 && after) {
      dependencies[0] = reinterpret_cast<cudaGraphNode_t>(after);
      if (edges) edges[0] = {};
    }
    *count = after ? 1 : 0;
    return cudaSuccess;
  });
}

cudaError_t cudaGraphDebugDotPrint(cudaGraph_t, const char*, unsigned) {
  return api("cudaGraphDebugDotPrint", kPlain, {}, [](Call&) { return cudaSuccess; });
}

cudaError_t cudaUserObjectCreate(cudaUserObject_t* out, void* data, cudaHostFn_t destroy,
                                 unsigned references, unsigned) {
  return api("cudaUserObjectCreate", kPlain, {}, [&](Call&) {
    *out = reinterpret_cast<cudaUserObject_t>(new UserObject{data, destroy, references});
    return cudaSuccess;
  });
}

cudaError_t cudaUserObjectRelease(cudaUserObject_t object, unsigned count) {
  return api("cudaUserObjectRelease", kPlain, {{"object", object}}, [&](Call&) {
    drop(reinterpret_cast<UserObject*>(object), count);
    return cudaSuccess;
  });
}

cudaError_t cudaGraphRetainUserObject(cudaGraph_t graph, cudaUserObject_t handle, unsigned count,
                                      unsigned flags) {
  return api("cudaGraphRetainUserObject", kPlain, {{"graph", graph}}, [&](Call&) {
    auto* object = reinterpret_cast<UserObject*>(handle);
    if (!(flags & cudaGraphUserObjectMove)) object->references += count;
    reinterpret_cast<Graph*>(graph)->retained.emplace_back(object, count);
    return cudaSuccess;
  });
}

cudaError_t cudaDeviceGetGraphMemAttribute(int, cudaGraphMemAttributeType, void* value) {
  return api("cudaDeviceGetGraphMemAttribute", kPlain, {}, [&](Call&) {
    *static_cast<uint64_t*>(value) = 0;
    return cudaSuccess;
  });
}

cudaError_t cudaDeviceSetGraphMemAttribute(int, cudaGraphMemAttributeType, void*) {
  return api("cudaDeviceSetGraphMemAttribute", kPlain, {}, [](Call&) { return cudaSuccess; });
}

}  // extern "C"
