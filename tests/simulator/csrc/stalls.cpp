// Calls that are made to wait, so that a test can act while another thread is in the midst of one.
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <string>
#include <vector>

#include "api.h"

namespace egm_sim {
namespace {

struct Stall {
  int id;
  std::string name;
  double seconds;  // negative: until it is ended
  long reached = 0;
};

// Leaked, like everything that calls may reach while the process ends.
struct Stalls {
  std::mutex mutex;
  std::condition_variable changed;
  std::vector<Stall> all;
  int next = 0;
  std::atomic<bool> any{false};

  Stall* find(int id) {
    for (Stall& stall : all) {
      if (stall.id == id) return &stall;
    }
    return nullptr;
  }
};

Stalls& stalls() {
  static Stalls* const instance = new Stalls;
  return *instance;
}

}  // namespace

void wait_if_stalled(const char* name) {
  Stalls& s = stalls();
  if (!s.any.load(std::memory_order_acquire)) return;
  std::unique_lock<std::mutex> lock(s.mutex);
  for (size_t i = 0; i < s.all.size(); ++i) {
    if (s.all[i].name != name) continue;
    const int id = s.all[i].id;
    const double seconds = s.all[i].seconds;
    ++s.all[i].reached;
    s.changed.notify_all();
    const auto ended = [&] { return s.find(id) == nullptr; };
    if (seconds < 0) {
      s.changed.wait(lock, ended);
    } else {
      s.changed.wait_for(lock, std::chrono::duration<double>(seconds), ended);
    }
    return;
  }
}

}  // namespace egm_sim

using egm_sim::stalls;

extern "C" {

int egm_sim_stall_call(const char* name, double seconds) {
  auto& s = stalls();
  std::lock_guard<std::mutex> lock(s.mutex);
  s.all.push_back({++s.next, name, seconds});
  s.any = true;
  return s.next;
}

// Whether a thread has got there within `timeout` seconds.
int egm_sim_wait_until_reached(int id, double timeout) {
  auto& s = stalls();
  std::unique_lock<std::mutex> lock(s.mutex);
  return s.changed.wait_for(lock, std::chrono::duration<double>(timeout), [&] {
    const auto* stall = s.find(id);
    return stall != nullptr && stall->reached > 0;
  });
}

void egm_sim_end_stall(int id) {
  auto& s = stalls();
  std::lock_guard<std::mutex> lock(s.mutex);
  for (size_t i = 0; i < s.all.size(); ++i) {
    if (s.all[i].id == id) {
      s.all.erase(s.all.begin() + static_cast<long>(i));
      break;
    }
  }
  s.any = !s.all.empty();
  s.changed.notify_all();
}

}  // extern "C"
