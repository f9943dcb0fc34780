// The Python face of the extension: conversions and the GIL, nothing else.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "bindings/hooks.h"
#include "bindings/host_stock.h"
#include "bindings/machine.h"
#include "core/state.h"
#include "cuda/errors.h"
#include "cuda/managed.h"
#include "cuda/mapped_ranges.h"
#include "cuda/residency.h"
#include "cuda/segments.h"
#include "torch/install.h"

namespace py = pybind11;

namespace {

using egm::Advice;
using egm::BackingKind;
using egm::Bytes;
using egm::check_device;
using egm::Config;

Advice make_advice(const std::optional<std::string>& preferred_location,
                   const std::vector<std::string>& accessed_by) {
  Advice advice;
  advice.preferred_location.reset();
  if (preferred_location) {
    advice.preferred_location = egm::parse_location("preferred_location", *preferred_location);
  }
  advice.accessed_by_device = advice.accessed_by_host = false;
  for (const auto& text : accessed_by) {
    (egm::parse_location("accessed_by", text) == egm::Location::kDevice ? advice.accessed_by_device
                                                                        : advice.accessed_by_host) =
        true;
  }
  return advice;
}

Config make_config(uint64_t threshold_bytes, const std::optional<std::vector<int>>& devices,
                   const std::string& mode, const std::string& backing,
                   const std::optional<std::string>& preferred_location,
                   const std::vector<std::string>& accessed_by, bool prefetch,
                   std::optional<uint64_t> limit_bytes, double device_fraction, bool spill,
                   std::optional<uint64_t> host_reserve_bytes) {
  Config config;
  config.threshold = Bytes(threshold_bytes);
  if (devices) {
    config.devices.emplace();
    for (const int device : *devices) {
      check_device(device);
      config.devices->set(static_cast<size_t>(device));
    }
  }
  config.mode = egm::parse_mode(mode);
  config.backing = egm::parse_backing(backing);
  config.advice = make_advice(preferred_location, accessed_by);
  config.prefetch = prefetch;
  if (limit_bytes) config.limit = Bytes(*limit_bytes);
  config.device_fraction = device_fraction;
  config.spill = spill;
  if (host_reserve_bytes) config.host_reserve = Bytes(*host_reserve_bytes);
  return config;
}

void configure(const Config& config) { egm::state().config.set(config); }
void enable(const Config& config) { egm::install().start(config); }

void disable() {
  if (auto* const allocator = egm::installed()) allocator->stop();
}

void stop_recordings() {
  if (auto* const allocator = egm::installed()) allocator->stop_recordings();
}

py::dict backing_stats(int device, BackingKind backing, const egm::TierReport::Blocks& live) {
  const auto c = egm::state().ledger.counters(device, backing);
  py::dict stats;
  stats["allocated_bytes"] = (live.allocated + c.pair_allocated).count();
  stats["reserved_bytes"] = c.reserved.count();
  stats["reserved_peak_bytes"] = c.reserved_peak.count();
  stats["segments"] = c.segments;
  stats["segment_allocs"] = c.segment_allocs;
  stats["segment_frees"] = c.segment_frees;
  stats["allocations"] = c.allocations;
  // Another thread's block may be live before it is counted.
  const uint64_t held = live.count + c.pair_mallocs - c.pair_frees;
  stats["frees"] = c.allocations > held ? c.allocations - held : 0;
  stats["prefetches"] = c.prefetches;
  stats["prefetch_failures"] = c.prefetch_failures;
  stats["advice_failures"] = c.advice_failures;
  stats["limit_refusals"] = c.limit_refusals;
  stats["reserve_refusals"] = c.reserve_refusals;
  stats["spills"] = c.spills;
  return stats;
}

py::dict stats(int device) {
  check_device(device);
  egm::TierReport report;
  auto* const allocator = egm::installed();
  if (allocator != nullptr && allocator->initialized()) {
    py::gil_scoped_release unlocked;
    report = allocator->report(static_cast<c10::DeviceIndex>(device));
  }
  py::dict device_tier;
  device_tier["allocated_bytes"] = report.device_allocated.count();
  device_tier["reserved_bytes"] = report.device_reserved.count();
  py::dict extended;
  for (const auto backing : egm::kAllBackings) {
    extended[egm::to_string(backing)] =
        backing_stats(device, backing, report.extended.at(static_cast<size_t>(backing)));
  }
  py::dict result;
  result["device_tier"] = device_tier;
  result["extended"] = extended;
  py::dict tags;
  for (const auto& [tag, bytes] : report.tags) {
    py::dict tagged;
    tagged["allocated_bytes"] = bytes.allocated.count();
    tagged["reserved_bytes"] = bytes.reserved.count();
    tags[py::int_(tag)] = tagged;
  }
  result["tags"] = tags;
  return result;
}

void reset_peak_stats(int device) {
  check_device(device);
  egm::state().ledger.reset_peaks(device);
}

// Moves the memory there; what the reserve has no room for on the host counts as refused.
template <typename Move>
auto counting_refusals(void* address, const Move& move) {
  try {
    return move();
  } catch (const egm::ReserveExceeded&) {
    if (const auto segment = egm::state().segments.find(address)) {
      egm::count_refusal(segment->device, segment->placement.backing, egm::Refusal::kByReserve);
    }
    throw;
  }
}

// From Python: "keep" leaves a location as it is, None unsets it.
void advise(uintptr_t address, uint64_t size_bytes, int device,
            const std::optional<std::string>& preferred_location,
            const std::optional<std::vector<std::string>>& accessed_by,
            std::optional<bool> read_mostly) {
  check_device(device);
  egm::AdviceChange change;
  if (preferred_location != "keep") {
    change.preferred_location.emplace();
    if (preferred_location) {
      change.preferred_location = egm::parse_location("preferred_location", *preferred_location);
    }
  }
  if (accessed_by) {
    const Advice advice = make_advice(std::nullopt, *accessed_by);
    change.accessed_by_device = advice.accessed_by_device;
    change.accessed_by_host = advice.accessed_by_host;
  }
  change.read_mostly = read_mostly;
  py::gil_scoped_release unlocked;
  const egm::ManagedRange range{reinterpret_cast<void*>(address), Bytes(size_bytes), device};
  if (change.preferred_location == egm::Location::kHost) egm::tell_hbm_of_torch();
  counting_refusals(range.address, [&] { egm::advise_managed(range, change); });
}

void prefetch(uintptr_t address, uint64_t size_bytes, int device, const std::string& location,
              uintptr_t stream, int stream_device) {
  check_device(device);
  check_device(stream_device);
  const egm::Location to = egm::parse_location("location", location);
  py::gil_scoped_release unlocked;
  const egm::ManagedRange range{reinterpret_cast<void*>(address), Bytes(size_bytes), device};
  if (to == egm::Location::kHost) egm::tell_hbm_of_torch();
  counting_refusals(range.address, [&] {
    egm::prefetch_managed(range, to, reinterpret_cast<cudaStream_t>(stream), stream_device);
  });
}

uint64_t migrate(uintptr_t segment_address, uint64_t on_device_bytes, int device) {
  check_device(device);
  auto* const allocator = egm::installed();
  if (allocator == nullptr) return 0;
  if (allocator->is_recorded_by_user(static_cast<c10::DeviceIndex>(device))) {
    throw std::runtime_error("memory cannot be moved on device " + std::to_string(device) +
                             " during a CUDA graph capture or within a use_mem_pool block");
  }
  py::gil_scoped_release unlocked;
  auto* const base = reinterpret_cast<void*>(segment_address);
  allocator->tell_hbm_of_torch();
  return counting_refusals(base,
                           [&] { return allocator->move(base, Bytes(on_device_bytes)).count(); });
}

void enter_place(uint64_t number, const std::string& backing, double device_fraction,
                 const std::string& layout, int tag, uint64_t min_bytes) {
  egm::ThisThread& thread = egm::this_thread();
  thread.place = new egm::PlaceBlock{number,
                                     {egm::parse_backing(backing), device_fraction,
                                      egm::parse_layout(layout), tag, Bytes(min_bytes)},
                                     thread.place};
}

// Not always the one entered last: suspended generators and tasks end in any order.
void leave_place(uint64_t number) {
  egm::PlaceBlock** link = &egm::this_thread().place;
  while (*link != nullptr && (*link)->number != number) link = &(*link)->outer;
  if (*link == nullptr) {
    throw std::runtime_error(
        "this thread is not in this place() block: leave it once, in the thread that entered it");
  }
  const std::unique_ptr<egm::PlaceBlock> left(*link);
  *link = left->outer;
}

py::object segment_of(uintptr_t address) {
  const auto segment = egm::state().segments.find(reinterpret_cast<const void*>(address));
  if (!segment) return py::none();
  // Of other memory the placement's advice is nobody's.
  const bool managed = segment->placement.backing == egm::BackingKind::kManaged;
  const Advice advice = managed ? segment->placement.advice : Advice{std::nullopt, false, false};
  py::list accessed_by;
  if (advice.accessed_by_device) accessed_by.append("device");
  if (advice.accessed_by_host) accessed_by.append("host");
  py::dict result;
  result["device"] = segment->device;
  result["backing"] = egm::to_string(segment->placement.backing);
  result["address"] = reinterpret_cast<uintptr_t>(segment->base);
  result["size_bytes"] = segment->size.count();
  result["preferred_location"] =
      advice.preferred_location ? py::object(py::str(egm::to_string(*advice.preferred_location)))
                                : py::object(py::none());
  result["accessed_by"] = py::tuple(accessed_by);
  result["prefetched"] = segment->placement.prefetch;
  result["spilled"] = segment->placement.spilled;
  result["tag"] = segment->placement.tag;
  const auto parts = egm::range_parts(segment->base);
  result["on_device_bytes"] =
      parts ? py::object(py::int_(parts->on_device.count())) : py::object(py::none());
  result["owner"] = segment->owner == egm::SegmentOwner::kPair ? "pair" : "torch";
  return result;
}

py::dict residency(uintptr_t address, uint64_t size_bytes, int device) {
  check_device(device);
  egm::Residency found;
  {
    py::gil_scoped_release unlocked;
    found = egm::residency(reinterpret_cast<const void*>(address), Bytes(size_bytes), device);
  }
  py::dict result;
  result["memory_type"] = found.memory_type;
  result["host_bytes"] = found.host.count();
  result["device_node_bytes"] = found.device_node.count();
  result["unmapped_bytes"] = found.unmapped.count();
  return result;
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  egm::set_python_hooks();
  module.doc() = "The compiled part of egm_alloc; see egm_alloc for the public interface.";
  py::class_<Config>(module, "Config")
      .def(py::init(&make_config), py::kw_only(), py::arg("threshold_bytes"), py::arg("devices"),
           py::arg("mode"), py::arg("backing"), py::arg("preferred_location"),
           py::arg("accessed_by"), py::arg("prefetch"), py::arg("limit_bytes"),
           py::arg("device_fraction"), py::arg("spill"), py::arg("host_reserve_bytes"));
  module.def("configure", &configure, py::arg("config"));
  module.def("enable", &enable, py::arg("config"));
  module.def("disable", &disable);
  module.def("stop_recordings", &stop_recordings, py::call_guard<py::gil_scoped_release>());
  module.def("is_enabled", &egm::is_diverting);
  module.def("caching_is_enabled", &egm::caching_is_enabled);
  module.def("stats", &stats, py::arg("device"));
  module.def("reset_peak_stats", &reset_peak_stats, py::arg("device"));
  module.def("advise", &advise, py::arg("address"), py::arg("size_bytes"), py::arg("device"),
             py::arg("preferred_location"), py::arg("accessed_by"), py::arg("read_mostly"));
  module.def("prefetch", &prefetch, py::arg("address"), py::arg("size_bytes"), py::arg("device"),
             py::arg("location"), py::arg("stream"), py::arg("stream_device"));
  module.def("migrate", &migrate, py::arg("segment_address"), py::arg("on_device_bytes"),
             py::arg("device"));
  module.def("enter_place", &enter_place, py::arg("number"), py::arg("backing"),
             py::arg("device_fraction"), py::arg("layout"), py::arg("tag"), py::arg("min_bytes"));
  module.def("leave_place", &leave_place, py::arg("number"));
  module.def("segment_of", &segment_of, py::arg("address"));
  egm::bind_machine(module);
  egm::bind_host_stock(module);
  module.def("residency", &residency, py::arg("address"), py::arg("size_bytes"), py::arg("device"));
}
