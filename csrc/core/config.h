// What the user asked for: the names, their spellings and the current configuration.
// Pure; how a request is placed under it is in placement.h.
#pragma once

#include <array>
#include <atomic>
#include <bitset>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "core/units.h"

namespace egm {

enum class Mode { kTiered, kManaged };
enum class BackingKind { kManaged, kDevice, kPinned, kNuma, kSplit };
inline constexpr int kBackingKinds = 5;
inline constexpr std::array<BackingKind, kBackingKinds> kAllBackings{
    BackingKind::kManaged, BackingKind::kDevice, BackingKind::kPinned, BackingKind::kNuma,
    BackingKind::kSplit};
enum class Location { kDevice, kHost };
// How a split tensor's parts lie: pieces in HBM and on the host by turns, or HBM's part first.
enum class SplitLayout { kSpread, kHead };

const char* to_string(Mode mode);
const char* to_string(BackingKind backing);
const char* to_string(Location location);

// Throw std::invalid_argument naming the argument, the value and what is allowed.
Mode parse_mode(const std::string& text);
// Nothing for "auto".
std::optional<BackingKind> parse_backing(const std::string& text);
Location parse_location(const std::string& argument, const std::string& text);
SplitLayout parse_layout(const std::string& text);

// Hints on managed memory (CUDA C++ Programming Guide, "Data Usage Hints").
struct Advice {
  std::optional<Location> preferred_location = Location::kDevice;
  bool accessed_by_device = false;
  bool accessed_by_host = true;

  friend bool operator==(const Advice& a, const Advice& b) {
    return a.preferred_location == b.preferred_location &&
           a.accessed_by_device == b.accessed_by_device && a.accessed_by_host == b.accessed_by_host;
  }
};

struct Config {
  Bytes threshold = gib(2);
  // No set: every device.
  std::optional<std::bitset<kMaxDevices>> devices;
  Mode mode = Mode::kTiered;
  // Nothing for "auto": what suits the device (core/auto_backing.h).
  std::optional<BackingKind> backing = BackingKind::kManaged;
  Advice advice;
  bool prefetch = true;
  std::optional<Bytes> limit;
  // Split: the part in HBM, from 0 to 1.
  double device_fraction = 0.5;
  // Serve from host memory what HBM cannot hold.
  bool spill = true;
  // Host memory that must stay free; none: default_reserve().
  std::optional<Bytes> host_reserve;

  friend bool operator==(const Config& a, const Config& b) {
    return a.threshold == b.threshold && a.devices == b.devices && a.mode == b.mode &&
           a.backing == b.backing && a.advice == b.advice && a.prefetch == b.prefetch &&
           a.limit == b.limit && a.device_fraction == b.device_fraction && a.spill == b.spill &&
           a.host_reserve == b.host_reserve;
  }

  bool acts_on(DeviceIndex device) const { return !devices || devices->test(device); }
};

// The configuration in force. Asking costs one load. Former ones are kept, for readers may still
// hold them; an equal one is used again, so that switching to and fro does not add any.
class ConfigCell {
 public:
  const Config& get() const { return *current_.load(std::memory_order_acquire); }

  void set(const Config& config) {
    std::lock_guard<std::mutex> lock(mutex_);
    for (const auto& known : known_) {
      if (!(*known == config)) continue;
      current_.store(known.get(), std::memory_order_release);
      return;
    }
    known_.push_back(std::make_unique<const Config>(config));
    current_.store(known_.back().get(), std::memory_order_release);
  }

 private:
  std::mutex mutex_;
  std::vector<std::unique_ptr<const Config>> known_ = first();
  std::atomic<const Config*> current_{known_.front().get()};

  static std::vector<std::unique_ptr<const Config>> first() {
    std::vector<std::unique_ptr<const Config>> configs;
    configs.push_back(std::make_unique<const Config>());
    return configs;
  }
};

}  // namespace egm
