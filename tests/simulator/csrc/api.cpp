// The lock, faults, refusals, log and last error that all simulated functions share.
#include "api.h"

#include <pthread.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <deque>
#include <vector>

#include "machine.h"
#include "streams.h"

namespace egm_sim {
namespace {

struct Fault {
  int id;
  std::string name;
  int error;
  long nth;
  long times;
  long fired = 0;
};

// Leaked: calls come in until the very end of the process, after static destructors.
struct Shared {
  pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
  bool used = false;
  bool forked_after_use = false;
  std::vector<Fault> faults;
  int next_fault = 0;
  bool counting = false;
  long counted = 0;
  bool logging = false;
  bool log_everything = false;
  size_t log_limit = 0;
  size_t log_dropped = 0;
  std::deque<std::string> log;
  std::vector<std::function<void()>> callbacks;
};

Shared& shared();

// A forked child must not inherit a lock that another thread of the parent held.
void before_fork() { pthread_mutex_lock(&shared().mutex); }
void parent_after_fork() { pthread_mutex_unlock(&shared().mutex); }
void child_after_fork() {
  shared().forked_after_use = shared().used;
  pthread_mutex_unlock(&shared().mutex);
}

Shared& shared() {
  static Shared* const instance = [] {
    pthread_atfork(before_fork, parent_after_fork, child_after_fork);
    return new Shared;
  }();
  return *instance;
}

thread_local int t_device = 0;
thread_local cudaError_t t_last_error = cudaSuccess;

// "*" means every call that the log shows by default; a quiet one has to be named.
bool matches(const Fault& fault, const char* name, unsigned traits) {
  return fault.name == name || (fault.name == "*" && !(traits & kQuiet));
}

// The error of a fault that is due at this call, else 0.
int injected(Shared& s, const char* name, unsigned traits) {
  for (Fault& fault : s.faults) {
    if (!matches(fault, name, traits) || fault.times == 0) continue;
    if (--fault.nth > 0) continue;
    --fault.times;
    ++fault.fired;
    return fault.error;
  }
  return 0;
}

void append(std::string& out, const Arg& arg) {
  if (out.back() != '{') out += ", ";
  out += '"';
  out += arg.key;
  out += "\": ";
  if (arg.json) {
    out += arg.text;
  } else if (arg.text) {
    out += '"';
    out += arg.text;
    out += '"';
  } else {
    out += std::to_string(arg.number);
  }
}

}  // namespace

Call::Call(const char* name, unsigned traits, std::initializer_list<Arg> args)
    : name_(name), traits_(traits) {
  wait_if_stalled(name);
  Shared& s = shared();
  pthread_mutex_lock(&s.mutex);
  logging_ = s.logging && (s.log_everything || !(traits & kQuiet));
  if (logging_) {
    text_ = "{\"name\": \"" + std::string(name) + "\", \"args\": {";
    for (const Arg& arg : args) append(text_, arg);
  }
}

int Call::refusal() {
  Shared& s = shared();
  if (s.counting && !(traits_ & kQuiet)) ++s.counted;
  if (!s.faults.empty()) {
    if (int error = injected(s, name_, traits_)) return error;
  }
  if (traits_ & kNeedsNoDriver) return cudaSuccess;
  if (!machine().preset->has_driver) return cudaErrorInsufficientDriver;
  if (machine().devices == 0) return cudaErrorNoDevice;
  if (s.forked_after_use) return cudaErrorInitializationError;
  s.used = true;
  if (traits_ & kUnsafeInCapture) return refuse_unsafe_in_capture();
  return cudaSuccess;
}

void Call::note(const Arg& arg) {
  if (logging_) append(text_, arg);
}

int Call::finish(int status) {
  Shared& s = shared();
  // The runtime's alone: the driver's errors are in what its functions return.
  const bool of_runtime = std::strncmp(name_, "cuda", 4) == 0;
  if (status != cudaSuccess && of_runtime) t_last_error = static_cast<cudaError_t>(status);
  if (logging_) {
    const char* name = error_name(status);
    text_ += "}, \"result\": \"" + (name ? std::string(name) : std::to_string(status)) +
             "\", \"device\": " + std::to_string(t_device) +
             ", \"thread\": " + std::to_string(syscall(SYS_gettid)) + "}";
    if (s.log.size() < s.log_limit) {
      s.log.push_back(std::move(text_));
    } else {
      ++s.log_dropped;
    }
  }
  std::vector<std::function<void()>> callbacks;
  callbacks.swap(s.callbacks);
  pthread_mutex_unlock(&s.mutex);
  for (const auto& callback : callbacks) callback();
  return status;
}

void run_unlocked(std::function<void()> callback) {
  shared().callbacks.push_back(std::move(callback));
}

int current_device() { return t_device; }
void set_current_device(int device) { t_device = device; }
cudaError_t last_error() { return t_last_error; }
cudaError_t take_last_error() {
  const cudaError_t error = t_last_error;
  t_last_error = cudaSuccess;
  return error;
}

void lock_simulator() { pthread_mutex_lock(&shared().mutex); }
void unlock_simulator() { pthread_mutex_unlock(&shared().mutex); }

int arm_fault(const char* name, int error, long nth, long times) {
  Locked locked;
  Shared& s = shared();
  s.faults.push_back({++s.next_fault, name, error, nth, times});
  return s.next_fault;
}

void disarm_fault(int id) {
  Locked locked;
  auto& faults = shared().faults;
  faults.erase(std::remove_if(faults.begin(), faults.end(),
                              [=](const Fault& fault) { return fault.id == id; }),
               faults.end());
}

void disarm_all_faults() {
  Locked locked;
  shared().faults.clear();
}

long faults_fired(int id) {
  Locked locked;
  for (const Fault& fault : shared().faults) {
    if (fault.id == id) return fault.fired;
  }
  return 0;
}

void count_calls(bool on) {
  Locked locked;
  shared().counting = on;
  if (on) shared().counted = 0;
}

long calls_counted() {
  Locked locked;
  return shared().counted;
}

void start_log(bool everything, size_t limit) {
  Locked locked;
  Shared& s = shared();
  s.log.clear();
  s.log_dropped = 0;
  s.logging = true;
  s.log_everything = everything;
  s.log_limit = limit;
}

void stop_log() {
  Locked locked;
  shared().logging = false;
}

// One JSON object a line; the last line is the number of calls that did not fit.
std::string take_log() {
  Locked locked;
  Shared& s = shared();
  std::string text;
  for (const std::string& line : s.log) text += line + "\n";
  text += std::to_string(s.log_dropped);
  s.log.clear();
  s.log_dropped = 0;
  return text;
}

}  // namespace egm_sim
