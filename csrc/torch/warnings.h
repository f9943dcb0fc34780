// Warnings for hints that failed. To be called with none of our locks held: they reach Python.
#pragma once

#include "torch/segment_source.h"

namespace egm {

// Each kind of failure once per process; stats() has the counts.
void warn_once(const Diversion::Problems& problems);

}  // namespace egm
