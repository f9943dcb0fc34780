// Scopes that change what the current thread is in the midst of, and put it back.
#pragma once

#include <utility>

#include "torch/segment_source.h"
#include "torch/this_thread.h"

namespace egm {

// Makes a diversion the current thread's for a scope.
class DiversionScope {
 public:
  DiversionScope(ThisThread& thread, Diversion& diversion) : thread_(thread) {
    outer_ = std::exchange(thread_.diversion, &diversion);
  }
  ~DiversionScope() { thread_.diversion = outer_; }
  DiversionScope(const DiversionScope&) = delete;
  DiversionScope& operator=(const DiversionScope&) = delete;

 private:
  ThisThread& thread_;
  // An observer's request may be diverted in the midst of another one.
  Diversion* outer_;
};

// Lets a request of an observer, made in the midst of this thread's diversion, pass by our pool.
class PassByScope {
 public:
  explicit PassByScope(Diversion* diversion) : diversion_(diversion) {
    if (diversion_ != nullptr) claimed_ = std::exchange(diversion_->claims, false);
  }
  ~PassByScope() {
    if (diversion_ != nullptr) diversion_->claims = claimed_;
  }
  PassByScope(const PassByScope&) = delete;
  PassByScope& operator=(const PassByScope&) = delete;

 private:
  Diversion* const diversion_;
  bool claimed_ = false;
};

// Note [Quiet tries]
// ~~~~~~~~~~~~~~~~~~
// A request that runs out of memory may be tried again after memory was given back. Only the last
// try's failure is the user's: one before it is not announced to out-of-memory observers and is
// taken out of num_ooms. torch's memory history shows each.
class QuietScope {
 public:
  QuietScope(ThisThread& thread, bool quiet)
      : thread_(thread), outer_(std::exchange(thread.quiet, quiet)) {}
  ~QuietScope() { thread_.quiet = outer_; }
  QuietScope(const QuietScope&) = delete;
  QuietScope& operator=(const QuietScope&) = delete;

 private:
  ThisThread& thread_;
  const bool outer_;
};

}  // namespace egm
