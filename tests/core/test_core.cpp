// The pure part of the library, tested as C++: placement, counters, the table of segments.
#include <random>
#include <stdexcept>
#include <string>

#include "checks.h"
#include "core/config.h"
#include "core/ledger.h"
#include "core/page_nodes.h"
#include "core/placement.h"
#include "core/segment_table.h"
#include "core/units.h"

namespace {

using namespace egm;

// No configuration here has the backing "auto".
std::optional<Placement> place(const Request& request, const Config& config,
                               const PlaceScope* scope) {
  return egm::place(request, config, scope, nullptr);
}
std::optional<Placement> spill_placement(const Request& request, const Config& config) {
  return egm::spill_placement(request, config, nullptr);
}

template <typename Call>
std::string message_of(const Call& call) {
  try {
    call();
  } catch (const std::invalid_argument& error) {
    return error.what();
  }
  return "";
}

void sums_and_differences_stop_at_the_ends() {
  constexpr Bytes kMost(UINT64_MAX);
  expect(saturated_sum(kMost, Bytes(1)) == kMost, "above");
  expect(saturated_sum(kMost - Bytes(1), Bytes(1)) == kMost, "at the end");
  expect(saturated_sum(Bytes(2), Bytes(3)) == Bytes(5), "within");
  expect(difference_or_zero(Bytes(2), Bytes(3)) == Bytes(0), "below");
  expect(difference_or_zero(Bytes(3), Bytes(2)) == Bytes(1), "above zero");
}

void names_round_trip_and_say_what_is_allowed() {
  expect(parse_mode(to_string(Mode::kManaged)) == Mode::kManaged, "mode round trip");
  for (const auto backing : kAllBackings) {
    expect(parse_backing(to_string(backing)) == backing, to_string(backing));
  }
  expect(message_of([] { parse_mode("fast"); }) == "mode is 'fast'; allowed: 'tiered', 'managed'",
         "unknown mode names argument, value and what is allowed");
  expect(message_of([] { parse_location("accessed_by", "moon"); }) ==
             "accessed_by is 'moon'; allowed: 'device', 'host'",
         "unknown location");
}

void tiered_places_from_the_threshold_up() {
  const Config config;
  expect(!place({gib(2) - Bytes(1), 0}, config, nullptr), "just below the threshold stays in HBM");
  const auto placement = place({gib(2), 0}, config, nullptr);
  expect(placement.has_value(), "at the threshold is extended");
  expect(placement && placement->backing == BackingKind::kManaged, "managed by default");
  expect(placement && !placement->prefetch, "large is not prefetched");
  expect(!place({Bytes(0), 0}, config, nullptr), "nothing stays nothing");
  expect(smallest_extended(config) == gib(2), "smallest");
}

void managed_places_everything_and_prefetches_below_the_threshold() {
  Config config;
  config.mode = Mode::kManaged;
  config.threshold = mib(16);
  expect(place({Bytes(1), 0}, config, nullptr)->prefetch, "one byte is prefetched");
  expect(place({mib(16) - Bytes(1), 0}, config, nullptr)->prefetch, "strictly less is prefetched");
  expect(!place({mib(16), 0}, config, nullptr)->prefetch, "the threshold itself is not");
  config.prefetch = false;
  expect(!place({Bytes(1), 0}, config, nullptr)->prefetch, "prefetch off");
  expect(smallest_extended(config) == Bytes(1), "smallest");
}

void only_chosen_devices_are_acted_on() {
  Config config;
  config.devices.emplace();
  config.devices->set(1);
  expect(!place({gib(3), 0}, config, nullptr), "device 0 is left alone");
  expect(place({gib(3), 1}, config, nullptr).has_value(), "device 1 is not");
}

void device_backing_ignores_advice() {
  Config one;
  one.backing = BackingKind::kDevice;
  Config other = one;
  other.advice.preferred_location.reset();
  expect(*place({gib(3), 0}, one, nullptr) == *place({gib(3), 0}, other, nullptr),
         "one placement, one set of pools");
}

void scope_decides_before_the_configuration() {
  Config config;
  config.devices
      .emplace();  // acts on no device: what a block of code asks for is done all the same
  PlaceScope scope{BackingKind::kPinned, 0, SplitLayout::kHead, 7, mib(1)};
  const auto placed = place({mib(1), 0}, config, &scope);
  expect(placed && placed->backing == BackingKind::kPinned && placed->tag == 7, "scope's backing");
  expect(!place({mib(1) - Bytes(1), 0}, config, &scope), "smaller is placed as without a scope");
  config.devices.reset();
  expect(place({gib(2), 0}, config, &scope)->backing == BackingKind::kPinned, "large too");
  scope.min_bytes = Bytes(0);
  expect(!place({Bytes(0), 0}, config, &scope), "nothing stays nothing");
  config.mode = Mode::kManaged;
  scope.backing = BackingKind::kDevice;
  expect(place({mib(1), 0}, config, &scope)->backing == BackingKind::kDevice, "mode managed too");
  expect(!place({mib(1), 0}, config, &scope)->prefetch, "only managed memory is prefetched");
}

void split_pools_are_for_one_size_fraction_and_layout() {
  Config config;
  config.backing = BackingKind::kSplit;
  config.device_fraction = 0.25;
  const auto placement = *place({gib(3), 0}, config, nullptr);
  expect(placement.device_fraction == 0.25, "the configuration's fraction");
  expect(!(placement == *place({gib(4), 0}, config, nullptr)), "another size");
  expect(placement == *place({gib(3), 0}, config, nullptr), "the same again");
  config.device_fraction = 0.5;
  expect(!(placement == *place({gib(3), 0}, config, nullptr)), "another fraction");
  PlaceScope scope{BackingKind::kSplit, 0.25, SplitLayout::kHead, 0, Bytes(0)};
  const auto head = *place({gib(3), 0}, config, &scope);
  scope.layout = SplitLayout::kSpread;
  expect(head.layout == SplitLayout::kHead, "the block's layout");
  expect(!(head == *place({gib(3), 0}, config, &scope)), "another layout");
  PlaceScope elsewhere{BackingKind::kNuma, 0, SplitLayout::kHead, 0, Bytes(0)};
  const auto with_head = *place({gib(3), 0}, config, &elsewhere);
  elsewhere.layout = SplitLayout::kSpread;
  expect(with_head == *place({gib(3), 0}, config, &elsewhere), "of no meaning elsewhere");
  expect(device_share(mib(8), 0.25) == mib(2), "the device's share");
  expect(host_share(mib(8), placement) == mib(6), "and the host's");
}

void spill_goes_to_host_memory() {
  Config config;
  for (const auto backing : kAllBackings) {
    config.backing = backing;
    const auto spill = spill_placement({mib(1), 0}, config);
    const auto expected = backing == BackingKind::kNuma ? backing : BackingKind::kPinned;
    expect(spill && spill->backing == expected && spill->spilled, to_string(backing));
  }
  config.devices.emplace();
  expect(!spill_placement({mib(1), 0}, config), "not on a device that is left alone");
  config.devices.reset();
  config.spill = false;
  expect(!spill_placement({mib(1), 0}, config), "switched off");
}

void size_classes_are_powers_of_two_of_a_gib() {
  expect(size_class(Bytes(1)) == 0 && size_class(gib(1) - Bytes(1)) == 0, "below 1 GiB");
  expect(size_class(gib(1)) == 1 && size_class(gib(2) - Bytes(1)) == 1, "1 to 2 GiB");
  expect(size_class(gib(3)) == 2 && size_class(gib(100)) == 7, "larger");
}

// Nothing negative, sums agree, peak >= current, the limit holds: over random operations.
void ledger_invariants(unsigned seed) {
  std::mt19937_64 random(seed);
  Ledger ledger;
  struct Live {
    BackingKind backing;
    Bytes size;
  };
  std::vector<Live> live;
  Bytes expected;
  const Bytes limit = mib(64);
  for (int step = 0; step < 2000; ++step) {
    if (random() % 2 == 0 || live.empty()) {
      const Live one{kAllBackings[random() % kAllBackings.size()], Bytes(random() % (16ULL << 20))};
      const bool fits = expected + one.size <= limit;
      expect(ledger.try_reserve(0, one.backing, one.size, limit) == fits, "limit decides");
      if (!fits) continue;
      if (random() % 8 == 0) {
        ledger.cancel_reservation(0, one.backing, one.size);
        continue;
      }
      ledger.segment_acquired(0, one.backing);
      live.push_back(one);
      expected = expected + one.size;
    } else {
      const size_t index = random() % live.size();
      ledger.segment_released(0, live[index].backing, live[index].size);
      expected = expected - live[index].size;
      live.erase(live.begin() + static_cast<long>(index));
    }
    if (random() % 50 == 0) ledger.reset_peaks(0);
    uint64_t segments = 0;
    for (const auto backing : kAllBackings) {
      const auto c = ledger.counters(0, backing);
      segments += c.segments;
      expect(c.segment_allocs - c.segment_frees == c.segments, "allocs - frees = segments");
      expect(c.reserved_peak >= c.reserved, "peak >= current");
    }
    expect(segments == live.size(), "segments counted");
    expect(ledger.reserved(0) == expected, "sum of backings");
    expect(ledger.reserved(1) == Bytes(0), "the other device is untouched");
  }
}

void segments_are_found_by_any_address_within() {
  SegmentTable table;
  Segment segment;
  segment.base = reinterpret_cast<void*>(0x10000);
  segment.size = Bytes(0x1000);
  table.insert(segment);
  const auto at = [](uintptr_t address) { return reinterpret_cast<const void*>(address); };
  expect(table.find(at(0x10000)) && table.find(at(0x10FFF)), "first and last byte");
  expect(!table.find(at(0xFFFF)) && !table.find(at(0x11000)), "neighbours");
  expect(!table.take(at(0x10001)), "only the base takes it");
  expect(table.take(at(0x10000)) && !table.find(at(0x10000)), "taken once");
  expect(!table.take(at(0x10000)), "not twice");
}

void pages_are_reported_where_the_kernel_has_them() {
  std::string touched(1 << 20, 'x');
  const auto nodes = page_nodes(touched.data(), Bytes(touched.size()));
  Bytes on_nodes;
  for (const auto& [node, bytes] : nodes.by_node) on_nodes = on_nodes + bytes;
  expect(on_nodes >= mib(1), "touched pages are on a node");
}

}  // namespace

int main() {
  sums_and_differences_stop_at_the_ends();
  names_round_trip_and_say_what_is_allowed();
  tiered_places_from_the_threshold_up();
  managed_places_everything_and_prefetches_below_the_threshold();
  only_chosen_devices_are_acted_on();
  device_backing_ignores_advice();
  scope_decides_before_the_configuration();
  split_pools_are_for_one_size_fraction_and_layout();
  spill_goes_to_host_memory();
  size_classes_are_powers_of_two_of_a_gib();
  for (unsigned seed = 0; seed < 20; ++seed) ledger_invariants(seed);
  segments_are_found_by_any_address_within();
  pages_are_reported_where_the_kernel_has_them();
  return exit_status();
}
