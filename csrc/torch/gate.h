// The mutex around one diversion on a device.
//
// Note [Gates]
// ~~~~~~~~~~~~
// One recording per pool can be underway at a time, and while any is, torch 2.11 and 2.12 treat the
// device as capturing for every thread: recorded streams are not waited for, emptyCache skips or
// asserts. A gate keeps a diversion apart from other diversions and from those calls.
//
// - A gate is taken before torch's device lock and our leaf locks, and gates of several devices in
//   ascending order.
// - No thread waits for a gate while it holds the GIL: under the gate torch may take the GIL, for
//   the memory-history recorder and for out-of-memory observers. The bindings set the hooks.
// - Observers are Python and may allocate: a thread that already holds a gate takes none, and its
//   requests go straight to torch.
#pragma once

#include <mutex>
#include <utility>
#include <vector>

#include "torch/this_thread.h"

namespace egm {

// Called around a wait. `before` returns a token that is handed to `after`.
struct WaitHooks {
  void* (*before)() = nullptr;
  void (*after)(void*) = nullptr;
};

inline WaitHooks& wait_hooks() {
  static WaitHooks hooks;
  return hooks;
}

class Gate {
 public:
  void lock() {
    if (mutex_.try_lock()) return;
    const WaitHooks& hooks = wait_hooks();
    void* const token = hooks.before ? hooks.before() : nullptr;
    mutex_.lock();
    if (hooks.after) hooks.after(token);
  }
  void unlock() { mutex_.unlock(); }

 private:
  std::mutex mutex_;
};

// Holds one gate for a scope, or none if the thread already holds any.
class GateScope {
 public:
  explicit GateScope(Gate& gate, ThisThread& thread = this_thread())
      : gate_(thread.gates_held == 0 ? &gate : nullptr), thread_(thread) {
    if (gate_ == nullptr) return;
    gate_->lock();
    ++thread_.gates_held;
  }
  ~GateScope() {
    if (gate_ == nullptr) return;
    --thread_.gates_held;
    gate_->unlock();
  }
  GateScope(const GateScope&) = delete;
  GateScope& operator=(const GateScope&) = delete;

 private:
  Gate* const gate_;
  ThisThread& thread_;
};

// Holds all of the given gates for a scope; the thread must hold none.
class AllGatesScope {
 public:
  explicit AllGatesScope(std::vector<Gate*> gates) : gates_(std::move(gates)) {
    for (Gate* gate : gates_) {
      gate->lock();
      ++this_thread().gates_held;
    }
  }
  ~AllGatesScope() {
    for (auto it = gates_.rbegin(); it != gates_.rend(); ++it) {
      --this_thread().gates_held;
      (*it)->unlock();
    }
  }
  AllGatesScope(const AllGatesScope&) = delete;
  AllGatesScope& operator=(const AllGatesScope&) = delete;

 private:
  std::vector<Gate*> gates_;
};

}  // namespace egm
