// What the current thread is in the midst of. One thread-local for all of it, because each is
// looked up in every request.
#pragma once

#include <cstdint>

#include "core/placement.h"

namespace egm {

struct Diversion;

// One of the place() blocks that the thread is in, the one entered last first.
struct PlaceBlock {
  // Of the place() that entered it.
  uint64_t number = 0;
  PlaceScope scope;
  PlaceBlock* outer = nullptr;
};

struct ThisThread {
  // See Note [Gates].
  int gates_held = 0;
  // Null outside a diversion.
  Diversion* diversion = nullptr;
  // The request underway is tried again if it runs out of memory: see Note [Quiet tries].
  bool quiet = false;
  // Null outside of place() blocks.
  PlaceBlock* place = nullptr;
};

inline ThisThread& this_thread() {
  thread_local ThisThread state;
  // Hidden where it comes from: GCC would look it up at each use rather than keep it.
  ThisThread* found = &state;
  asm("" : "+r"(found));
  return *found;
}

}  // namespace egm
