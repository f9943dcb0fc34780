// The one state of the process that the C pair and the allocator share.
#pragma once

#include "core/config.h"
#include "core/ledger.h"
#include "core/segment_table.h"

namespace egm {

struct State {
  ConfigCell config;
  Ledger ledger;
  SegmentTable segments;
};

// Leaked on purpose: torch frees segments from its own static destructors, after ours would have
// run.
inline State& state() {
  static State* const instance = new State;
  return *instance;
}

}  // namespace egm
