// How many threads this process may run at once.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

namespace egm {

// The least CPU quota of the control groups of this process, of both versions, from its own up to
// the root: in whole cores, rounded down, but at least one. Nothing if none is set and can be read.
// `root` goes before /proc and /sys.
std::optional<uint64_t> quota_cores(const std::string& root = "");

// Its CPU affinity and that quota count.
unsigned usable_cores(const std::string& root = "");

}  // namespace egm
