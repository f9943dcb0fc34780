// Reading the kernel's text files without ever failing on what they hold.
#include "core/kernel_files.h"

#include <charconv>
#include <climits>
#include <filesystem>
#include <fstream>
#include <system_error>

namespace egm {
namespace {

constexpr std::string_view kSpace = " \t\n";

std::string_view trimmed(std::string_view text) {
  const auto first = text.find_first_not_of(kSpace);
  if (first == std::string_view::npos) return {};
  return text.substr(first, text.find_last_not_of(kSpace) - first + 1);
}

// Cuts the first word off `text`.
std::string_view take_word(std::string_view& text) {
  text = trimmed(text);
  const auto word = text.substr(0, text.find_first_of(kSpace));
  text.remove_prefix(word.size());
  return word;
}

void read_line(std::string_view line, SizeTable& table) {
  auto key = take_word(line);
  if (key == "Node") {  // of /sys/devices/system/node/node*/meminfo
    take_word(line);
    key = take_word(line);
  }
  if (!key.empty() && key.back() == ':') key.remove_suffix(1);
  const auto number = parse_number(take_word(line));
  const auto unit = trimmed(line);
  if (key.empty() || !number) return;
  if (unit.empty()) {
    table[std::string(key)] = Bytes(*number);
  } else if (unit == "kB" && *number <= UINT64_MAX >> 10) {
    table[std::string(key)] = Bytes(*number << 10);
  }
}

}  // namespace

std::optional<std::string> read_text(const std::string& path) {
  std::ifstream file(path);
  std::string text;
  // Unlike a streambuf iterator, getline does not throw if `path` is a folder or reading fails.
  // These files hold no NUL, so that it takes all.
  std::getline(file, text, '\0');
  if (file.bad() || text.empty()) return std::nullopt;
  return text;
}

std::optional<uint64_t> parse_number(std::string_view text) {
  text = trimmed(text);
  int base = 10;
  if (text.substr(0, 2) == "0x") {
    text.remove_prefix(2);
    base = 16;
  }
  uint64_t number = 0;
  const char* const end = text.data() + text.size();
  const auto [stop, error] = std::from_chars(text.data(), end, number, base);
  if (error != std::errc() || stop != end) return std::nullopt;
  return number;
}

std::optional<Bytes> read_size(const std::string& path) {
  const auto text = read_text(path);
  const auto number = text ? parse_number(*text) : std::nullopt;
  if (!number) return std::nullopt;
  return Bytes(*number);
}

SizeTable read_sizes(const std::string& path) {
  SizeTable table;
  const auto text = read_text(path);
  if (!text) return table;
  for (const auto& line : split(*text, '\n')) read_line(line, table);
  return table;
}

std::optional<Bytes> size_at(const SizeTable& table, const std::string& key) {
  const auto found = table.find(key);
  if (found == table.end()) return std::nullopt;
  return found->second;
}

std::vector<std::string> split(std::string_view text, char separator) {
  std::vector<std::string> parts;
  while (true) {
    const auto end = text.find(separator);
    parts.emplace_back(text.substr(0, end));
    if (end == std::string_view::npos) return parts;
    text.remove_prefix(end + 1);
  }
}

std::map<int, std::string> numbered_entries(const std::string& folder, const std::string& prefix) {
  std::map<int, std::string> entries;
  std::error_code error;
  std::filesystem::directory_iterator entry(folder, error);
  for (; !error && entry != std::filesystem::directory_iterator(); entry.increment(error)) {
    const auto name = entry->path().filename().string();
    if (name.compare(0, prefix.size(), prefix) != 0) continue;
    const auto number = parse_number(std::string_view(name).substr(prefix.size()));
    if (number && *number <= INT_MAX) entries[static_cast<int>(*number)] = entry->path().string();
  }
  return entries;
}

}  // namespace egm
