// What fits beside the reserve, and what managed memory may still take of the host.
#include <cstdint>
#include <string>

#include "checks.h"
#include "core/reserve.h"
#include "core/units.h"

namespace {

using namespace egm;

constexpr Bytes kMost(UINT64_MAX);

ReserveQuestion question() {
  return {gib(3),
          gib(5),
          gib(2),
          gib(4),
          gib(1),
          gib(24),
          {gib(480), gib(39), "cgroup limit of /x (memory.max)"}};
}

void what_fits_exactly_fits() {
  expect(!over_reserve(question()), "to the byte");
  for (const auto part : {&ReserveQuestion::asked, &ReserveQuestion::promised,
                          &ReserveQuestion::pending, &ReserveQuestion::promised_elsewhere,
                          &ReserveQuestion::pending_elsewhere, &ReserveQuestion::reserve}) {
    auto more = question();
    more.*part = more.*part + Bytes(1);
    expect(over_reserve(more).has_value(), "one byte more of any part does not");
  }
  auto less = question();
  less.host.available = less.host.available - Bytes(1);
  expect(over_reserve(less).has_value(), "one byte less available does not");
  expect(!over_reserve({}), "nothing of nothing");
}

void sums_that_wrap_do_not_fit() {
  for (const auto one : {&ReserveQuestion::asked, &ReserveQuestion::promised,
                         &ReserveQuestion::pending, &ReserveQuestion::promised_elsewhere,
                         &ReserveQuestion::pending_elsewhere, &ReserveQuestion::reserve}) {
    const Bytes little(1);
    ReserveQuestion most{little, little, little, little, little, little, {kMost, kMost, "x"}};
    most.*one = kMost;
    expect(over_reserve(most).has_value(), "more than a number holds");
    most.host.available = Bytes(2);
    expect(over_reserve(most).has_value(), "nor where little is available");
  }
  expect(over_reserve({kMost, kMost, kMost, kMost, kMost, kMost, {kMost, kMost, "x"}}).has_value(),
         "all");
}

void the_sentence_names_everything() {
  auto asked = question();
  asked.asked = gib(4) + mib(512);
  const std::string begin =
      "4.50 GiB (4831838208 bytes) of host memory would cut into the reserve of 24.00 GiB that "
      "must "
      "stay free: of 480.00 GiB, 39.00 GiB can be taken (limited by cgroup limit of /x "
      "(memory.max)); 5.00 GiB of that is promised to managed memory that is not populated yet and "
      "2.00 GiB to requests under way";
  const std::string end =
      " bytes) are missing. Lower host_reserve_gib (EGM_ALLOC_HOST_RESERVE_GIB), free tensors or "
      "call torch.cuda.empty_cache().";
  expect(over_reserve(asked).value_or("") ==
             begin +
                 ", 4.00 GiB to managed memory and 1.00 GiB to requests of other processes, so "
                 "that 1.50 GiB (1610612736" +
                 end,
         "sentence: " + over_reserve(asked).value_or("none"));
  asked.promised_elsewhere = asked.pending_elsewhere = Bytes(0);
  asked.asked = asked.asked + gib(5);
  expect(over_reserve(asked).value_or("").find("under way, so that 1.50 GiB") != std::string::npos,
         "alone: " + over_reserve(asked).value_or("none"));
}

void what_is_missing_counts_from_nothing_left() {
  auto little = question();
  little.host.available = gib(10);
  expect(over_reserve(little).value_or("").find("so that 29.00 GiB (31138512896 bytes) are") !=
             std::string::npos,
         "the reserve alone is too much: " + over_reserve(little).value_or("none"));
}

void the_default_is_a_twentieth() {
  expect(default_reserve(gib(480)) == gib(24), "5 %");
  expect(default_reserve(Bytes(19)) == Bytes(0) && default_reserve(kMost) < kMost, "ends");
}

void hbm_of_others_agrees_with_what_is_seen() {
  const Bytes none(0);
  const auto seen = [](Bytes free, Bytes of_torch, Bytes managed) {
    return HbmUse{gib(80), free, of_torch, managed};
  };
  const HbmUse at_first = seen(gib(50), gib(20), none);
  expect(hbm_of_others(none, {}, at_first) == gib(10), "exact while nothing is managed");
  expect(hbm_of_others(gib(10), at_first, at_first) == gib(10), "still the same");
  expect(hbm_of_others(gib(25), at_first, at_first) == gib(10), "exact again");
  const HbmUse filled = seen(gib(15), gib(20), gib(40));
  expect(hbm_of_others(gib(10), at_first, filled) == gib(10), "what came since may be managed");
  const HbmUse full = seen(none, gib(20), gib(40));
  expect(hbm_of_others(gib(10), filled, full) == gib(20), "not all of it");
  const HbmUse less = seen(gib(19), gib(20), gib(40));
  expect(hbm_of_others(gib(10), filled, less) == gib(6), "others gave some back");
  const HbmUse much_less = seen(gib(55), gib(20), gib(40));
  expect(hbm_of_others(gib(10), filled, much_less) == none, "all of it and more");
  const HbmUse freed = seen(gib(30), gib(20), gib(25));
  expect(hbm_of_others(gib(10), filled, freed) == gib(10), "managed memory was freed");
  const HbmUse evicted = seen(gib(15), gib(24), gib(40));
  expect(hbm_of_others(gib(10), filled, evicted) == gib(6), "torch may have taken it from others");
  expect(hbm_of_others(gib(10), at_first, seen(gib(10), gib(90), gib(1))) == none,
         "torch's is told at another moment");
  expect(hbm_of_others(kMost, {kMost, kMost, kMost, kMost}, {kMost, kMost, kMost, kMost}) == none,
         "ends");
  expect(hbm_of_others(kMost, {}, seen(none, none, none)) == gib(80), "no more than there is");
}

void promises_are_what_hbm_cannot_hold() {
  const Bytes none(0);
  const auto promised = [](Bytes bound, Bytes other, Bytes of_torch, Bytes of_others) {
    return promised_to_host(bound, other, {gib(80), Bytes(0), of_torch, Bytes(0)}, of_others);
  };
  expect(promised(gib(7), none, none, none) == gib(7), "all that is bound for the host");
  expect(promised(none, gib(70), gib(7), gib(3)) == none, "fits exactly");
  expect(promised(none, gib(70), gib(7), gib(3) + Bytes(1)) == Bytes(1), "one byte too much");
  expect(promised(none, gib(100), none, none) == gib(20), "managed alone");
  expect(promised(none, gib(100), gib(20), gib(10)) == gib(50), "all of them");
  expect(promised(none, gib(15), gib(20), gib(10)) == none, "the rest is on the host already");
  expect(promised(gib(7), gib(100), none, none) == gib(27), "the sum");
  expect(promised(none, gib(1), gib(60), gib(30)) == gib(1), "HBM is full already");
  expect(promised_to_host(none, gib(1), {}, none) == gib(1), "no HBM");
}

void promises_do_not_wrap() {
  const Bytes none(0);
  const HbmUse nothing{none, none, kMost, none};
  const HbmUse all{kMost, kMost, none, none};
  expect(promised_to_host(kMost, kMost, nothing, kMost) == kMost, "everything");
  expect(promised_to_host(none, kMost, all, none) == none, "exactly HBM");
  expect(promised_to_host(none, kMost, all, kMost) == kMost, "exactly HBM twice");
  expect(promised_to_host(kMost, gib(2), {gib(1), none, none, none}, none) == kMost, "the sum");
}

}  // namespace

int main() {
  what_fits_exactly_fits();
  sums_that_wrap_do_not_fit();
  the_sentence_names_everything();
  what_is_missing_counts_from_nothing_left();
  the_default_is_a_twentieth();
  hbm_of_others_agrees_with_what_is_seen();
  promises_are_what_hbm_cannot_hold();
  promises_do_not_wrap();
  return exit_status();
}
