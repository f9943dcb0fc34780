// What backing "auto" means, for every kind of machine, and where place() asks for it.
#include <stdexcept>
#include <string>

#include "checks.h"
#include "core/auto_backing.h"
#include "core/placement.h"

namespace {

using namespace egm;

void expect_choice(const DeviceTraits& traits, BackingKind backing, const std::string& word,
                   const std::string& what) {
  const Choice choice = choose_backing(traits);
  expect(choice.backing == backing, what + " gets " + to_string(choice.backing));
  const std::string reason = choice.reason;
  expect(reason.find(word) != std::string::npos, what + " says why: " + reason);
  expect(!reason.empty() && reason.back() != '.', what + ": no full stop");
}

DeviceTraits pcie() {
  DeviceTraits traits;
  traits.managed = traits.concurrent_managed_access = true;
  traits.host_numa_vmm = traits.registered_host_pointers = true;
  traits.host_numa_node = 0;
  return traits;
}

DeviceTraits coherent() {
  DeviceTraits traits = pcie();
  traits.pageable_memory_access = traits.uses_host_page_tables = true;
  traits.hbm_numa_node = 1;
  return traits;
}

void each_machine_gets_what_suits_it() {
  expect_choice(pcie(), BackingKind::kPinned, "PCIe", "PCIe");
  expect_choice(coherent(), BackingKind::kManaged, "page tables", "a coherent link");

  DeviceTraits driver_managed = coherent();
  driver_managed.hbm_numa_node = -1;
  expect_choice(driver_managed, BackingKind::kManaged, "page tables", "coherent without a node");

  DeviceTraits integrated = coherent();
  integrated.integrated = true;
  expect_choice(integrated, BackingKind::kManaged, "one memory", "one memory");

  DeviceTraits carved = coherent();
  carved.egm_carveout = true;
  expect_choice(carved, BackingKind::kNuma, "EGM", "a carve-out");
  carved.host_numa_vmm = false;
  expect_choice(carved, BackingKind::kManaged, "page tables", "a carve-out out of reach");
}

// Heterogeneous memory management: the GPU faults on ordinary memory, over PCIe all the same.
void software_page_faults_are_no_coherent_link() {
  DeviceTraits traits = pcie();
  traits.pageable_memory_access = true;
  expect_choice(traits, BackingKind::kPinned, "PCIe", "PCIe with page faults");
}

void what_is_missing_is_not_chosen() {
  DeviceTraits traits = pcie();
  traits.registered_host_pointers = false;
  expect_choice(traits, BackingKind::kManaged, "pinned", "no pinned memory");

  for (const bool integrated : {false, true}) {
    DeviceTraits alone = pcie();
    alone.integrated = integrated;
    alone.concurrent_managed_access = false;
    expect_choice(alone, BackingKind::kPinned, "while the CPU does", "no concurrent access");
    alone.registered_host_pointers = false;
    expect_choice(alone, BackingKind::kNuma, "NUMA", "nor pinned memory");
    alone.host_numa_vmm = false;
    expect_choice(alone, BackingKind::kManaged, "nothing else", "nothing else");
  }
  DeviceTraits no_managed = pcie();
  no_managed.managed = false;
  expect_choice(no_managed, BackingKind::kPinned, "managed memory", "no managed memory");
}

int asked = 0;
BackingKind numa_on_odd_devices(DeviceIndex device) {
  ++asked;
  return device % 2 ? BackingKind::kNuma : BackingKind::kManaged;
}

void auto_is_resolved_by_device_and_only_where_it_is_wanted() {
  Config config;
  const Request large{gib(3), 1};
  place(large, config, nullptr, numa_on_odd_devices);
  spill_placement(large, config, numa_on_odd_devices);
  expect(asked == 0, "a named backing asks nobody");
  config.backing.reset();
  place({gib(1), 1}, config, nullptr, numa_on_odd_devices);
  expect(asked == 0, "nor does a request that stays in HBM");
  const auto odd = place(large, config, nullptr, numa_on_odd_devices);
  expect(odd && odd->backing == BackingKind::kNuma, "device 1");
  expect(odd && odd->advice == Advice(), "advice is for managed memory alone");
  const auto even = place({gib(3), 0}, config, nullptr, numa_on_odd_devices);
  expect(even && even->backing == BackingKind::kManaged, "device 0");
  expect(asked == 2, "once a request");

  const auto spilled = spill_placement({gib(1), 1}, config, numa_on_odd_devices);
  expect(spilled && spilled->backing == BackingKind::kNuma, "spills where auto is on the host");
  const auto otherwise = spill_placement({gib(1), 0}, config, numa_on_odd_devices);
  expect(otherwise && otherwise->backing == BackingKind::kPinned, "else to pinned memory");

  config.backing = BackingKind::kDevice;
  PlaceScope scope;
  scope.backing.reset();
  const auto placed = place({mib(1), 0}, config, &scope, numa_on_odd_devices);
  expect(placed && placed->backing == BackingKind::kManaged && placed->prefetch, "a block's auto");
}

void auto_has_a_spelling() {
  expect(!parse_backing("auto"), "auto");
  expect(parse_backing("numa") == BackingKind::kNuma, "a name");
  try {
    parse_backing("hbm");
    expect(false, "unknown names are refused");
  } catch (const std::invalid_argument& error) {
    expect(std::string(error.what()) ==
               "backing is 'hbm'; allowed: 'auto', 'managed', 'device', 'pinned', 'numa', 'split'",
           error.what());
  }
}

}  // namespace

int main() {
  each_machine_gets_what_suits_it();
  software_page_faults_are_no_coherent_link();
  what_is_missing_is_not_chosen();
  auto_is_resolved_by_device_and_only_where_it_is_wanted();
  auto_has_a_spelling();
  return exit_status();
}
