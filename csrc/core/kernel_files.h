// How the kernel's text files (/proc, /sys, cgroups) are read: numbers, and tables of sizes.
// A file that is missing, cannot be read or holds something else gives nothing, never an error.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "core/units.h"

namespace egm {

// Key to size, from lines like "MemFree: 12 kB", "Node 0 MemFree: 12 kB" and "inactive_file 12288".
// Lines of any other form are left out.
using SizeTable = std::map<std::string, Bytes>;

std::optional<std::string> read_text(const std::string& path);
// A file that holds one number, decimal or with 0x, and white space around it.
std::optional<Bytes> read_size(const std::string& path);
// Empty if the file gives nothing.
SizeTable read_sizes(const std::string& path);

std::optional<Bytes> size_at(const SizeTable& table, const std::string& key);
std::optional<uint64_t> parse_number(std::string_view text);
std::vector<std::string> split(std::string_view text, char separator);
// The entries of a folder that are called `prefix` and a number, by that number.
std::map<int, std::string> numbered_entries(const std::string& folder, const std::string& prefix);

}  // namespace egm
