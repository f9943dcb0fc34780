// Warnings for hints that failed. To be called with none of our locks held: they reach Python.
//
// Note [Warnings as errors]
// ~~~~~~~~~~~~~~~~~~~~~~~~~
// A warning is an error to those who say so (warnings.simplefilter("error")), so whoever warns of a
// request that was served gives the block back if that throws. TORCH_WARN would not do: it is kept
// until the operator is over, and if it is an error then, torch loses the operator's result.
#pragma once

#include <string>

#include "torch/segment_source.h"

namespace egm {

// Says it to Python's warnings, and throws what that raises. The bindings set it.
using WarningHook = void (*)(const std::string& message);
WarningHook& warning_hook();

// Each kind of failure once per process; stats() has the counts.
void warn_once(const Diversion::Problems& problems);

// Once per process: HBM could not hold a request, which was served from host memory.
void warn_of_spill(const Request& request, BackingKind backing);

}  // namespace egm
