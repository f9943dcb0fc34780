// What each C++ test program uses to check: one line per failed check, and the exit status.
#pragma once

#include <cstdio>
#include <string>

inline int failures = 0;

inline void expect(bool holds, const std::string& what) {
  if (holds) return;
  ++failures;
  std::printf("FAILED: %s\n", what.c_str());
}

// Not the number of failures: a status has 8 bits, and 256 failures would pass.
inline int exit_status() { return failures == 0 ? 0 : 1; }
