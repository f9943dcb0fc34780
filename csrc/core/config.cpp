// The spellings of the configuration's names.
#include "core/config.h"

#include <array>
#include <stdexcept>
#include <utility>

namespace egm {
namespace {

template <typename Enum, size_t N>
using Names = std::array<std::pair<Enum, const char*>, N>;

constexpr Names<Mode, 2> kModes{{{Mode::kTiered, "tiered"}, {Mode::kManaged, "managed"}}};
constexpr Names<BackingKind, kBackingKinds> kBackings{{{BackingKind::kManaged, "managed"},
                                                       {BackingKind::kDevice, "device"},
                                                       {BackingKind::kPinned, "pinned"},
                                                       {BackingKind::kNuma, "numa"},
                                                       {BackingKind::kSplit, "split"}}};
constexpr Names<Location, 2> kLocations{{{Location::kDevice, "device"}, {Location::kHost, "host"}}};
constexpr Names<SplitLayout, 2> kLayouts{
    {{SplitLayout::kSpread, "spread"}, {SplitLayout::kHead, "head"}}};

template <typename Enum, size_t N>
const char* name_of(const Names<Enum, N>& names, Enum value) {
  for (const auto& [candidate, name] : names) {
    if (candidate == value) return name;
  }
  return "unknown";
}

template <typename Enum, size_t N>
Enum parse(const Names<Enum, N>& names, const std::string& argument, const std::string& text,
           std::string allowed = "") {
  for (const auto& [value, name] : names) {
    if (text == name) return value;
    allowed += (allowed.empty() ? "'" : ", '") + std::string(name) + "'";
  }
  throw std::invalid_argument(argument + " is '" + text + "'; allowed: " + allowed);
}

}  // namespace

const char* to_string(Mode mode) { return name_of(kModes, mode); }
const char* to_string(BackingKind backing) { return name_of(kBackings, backing); }
const char* to_string(Location location) { return name_of(kLocations, location); }

Mode parse_mode(const std::string& text) { return parse(kModes, "mode", text); }
std::optional<BackingKind> parse_backing(const std::string& text) {
  if (text == "auto") return std::nullopt;
  return parse(kBackings, "backing", text, "'auto'");
}
Location parse_location(const std::string& argument, const std::string& text) {
  return parse(kLocations, argument, text);
}
SplitLayout parse_layout(const std::string& text) { return parse(kLayouts, "layout", text); }

}  // namespace egm
