// What every simulated function goes through: the one lock, injected faults, refusals (no driver,
// fork, stream capture), the call log and the last error. It knows nothing of any single function.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstdint>
#include <functional>
#include <initializer_list>
#include <string>
#include <type_traits>

#include "machine.h"

namespace egm_sim {

// A named argument of a call, kept as it is until the log wants it.
struct Arg {
  const char* key = nullptr;
  long long number = 0;
  const char* text = nullptr;
  bool json = false;

  Arg() = default;
  template <class T, std::enable_if_t<std::is_integral_v<T> || std::is_enum_v<T>, int> = 0>
  Arg(const char* key, T value) : key(key), number(static_cast<long long>(value)) {}
  Arg(const char* key, const void* value)
      : key(key), number(static_cast<long long>(reinterpret_cast<uintptr_t>(value))) {}
  static Arg of_text(const char* key, const char* text) {
    Arg arg(key, 0);
    arg.text = text;
    return arg;
  }
  static Arg of_json(const char* key, const char* text) {
    Arg arg = of_text(key, text);
    arg.json = true;
    return arg;
  }
};

enum Traits : unsigned {
  kPlain = 0,
  // Called so often that the log leaves it out unless asked.
  kQuiet = 1,
  // Answers without a driver, and does not make a later fork unusable.
  kNeedsNoDriver = 2,
  // "Potentially unsafe" in the sense of cudaThreadExchangeStreamCaptureMode.
  kUnsafeInCapture = 4,
};

class Call {
 public:
  Call(const char* name, unsigned traits, std::initializer_list<Arg> args);
  Call(const Call&) = delete;
  Call& operator=(const Call&) = delete;

  // An error that stops the call before it does anything, else 0.
  int refusal();
  // Adds an argument that is known only now, such as the address returned.
  void note(const Arg& arg);
  // Logs, sets the last error, unlocks, runs callbacks that were due, returns `status`.
  int finish(int status);

 private:
  const char* name_;
  unsigned traits_;
  bool logging_;
  std::string text_;
};

template <class Result = cudaError_t, class Body>
Result api(const char* name, unsigned traits, std::initializer_list<Arg> args, Body body) {
  Call call(name, traits, args);
  int status = call.refusal();
  if (status == 0) status = static_cast<int>(body(call));
  return static_cast<Result>(call.finish(status));
}

// Waits while a test holds up calls of this name (see stalls.cpp). Takes no lock of api.cpp's.
void wait_if_stalled(const char* name);

// Runs `callback` once the lock is given up: it may take other locks, such as Python's.
void run_unlocked(std::function<void()> callback);

// Per thread.
int current_device();
void set_current_device(int device);
cudaError_t take_last_error();
cudaError_t last_error();

// The spelling of an error, or nullptr; and the number behind a name ("cudaErrorMemoryAllocation",
// "CUDA_ERROR_OUT_OF_MEMORY"), or -1.
const char* error_name(int error);
const char* error_text(int error);
int error_number(const char* name);

// Control of faults and log (see control.cpp). All take the lock themselves.
// Returns a number for disarm_fault and faults_fired. `name` may be "*".
int arm_fault(const char* name, int error, long nth, long times);
void disarm_fault(int fault);
void disarm_all_faults();
long faults_fired(int fault);
void count_calls(bool on);
long calls_counted();
void start_log(bool everything, size_t limit);
void stop_log();
std::string take_log();

// For control functions, which are no calls of the simulated API.
void lock_simulator();
void unlock_simulator();
struct Locked {
  Locked() { lock_simulator(); }
  ~Locked() { unlock_simulator(); }
  Locked(const Locked&) = delete;
  Locked& operator=(const Locked&) = delete;
};

}  // namespace egm_sim
