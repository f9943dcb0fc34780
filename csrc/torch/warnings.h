// Warnings for hints that failed. To be called with none of our locks held: they reach Python.
#pragma once

#include "torch/segment_source.h"

namespace egm {

// Each kind of failure once per process; stats() has the counts.
void warn_once(const Diversion::Problems& problems);

// Once per process: HBM could not hold a request, which was served from host memory.
void warn_of_spill(const Request& request, BackingKind backing);

}  // namespace egm
