// What the user asked for: the names, their spellings and the current configuration.
// Pure; how a request is placed under it is in placement.h.
#pragma once

#include <bitset>
#include <memory>
#include <mutex>
#include <optional>
#include <string>

#include "core/units.h"

namespace egm {

enum class Mode { kTiered, kManaged };
enum class BackingKind { kManaged, kDevice };
inline constexpr int kBackingKinds = 2;
enum class Location { kDevice, kHost };

const char* to_string(Mode mode);
const char* to_string(BackingKind backing);
const char* to_string(Location location);

// Throw std::invalid_argument naming the argument, the value and what is allowed.
Mode parse_mode(const std::string& text);
BackingKind parse_backing(const std::string& text);
Location parse_location(const std::string& argument, const std::string& text);

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
  BackingKind backing = BackingKind::kManaged;
  Advice advice;
  bool prefetch = true;
  std::optional<Bytes> limit;

  bool acts_on(DeviceIndex device) const { return !devices || devices->test(device); }
};

// The configuration in force. Readers take a snapshot and keep it; a writer replaces it whole.
class ConfigCell {
 public:
  std::shared_ptr<const Config> get() const {
    std::lock_guard<std::mutex> lock(mutex_);
    return config_;
  }
  void set(const Config& config) {
    auto next = std::make_shared<const Config>(config);
    std::lock_guard<std::mutex> lock(mutex_);
    config_.swap(next);
  }

 private:
  mutable std::mutex mutex_;
  std::shared_ptr<const Config> config_ = std::make_shared<const Config>();
};

}  // namespace egm
