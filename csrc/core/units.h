// Sizes and device numbers as types. Pure; nothing here touches CUDA or torch.
#pragma once

#include <cstdint>

namespace egm {

using DeviceIndex = int;

// The most devices that per-device tables hold; torch's DeviceIndex is an int8_t.
inline constexpr DeviceIndex kMaxDevices = 128;

// A number of bytes. Entered explicitly and left explicitly, so that a GiB never passes for a byte.
class Bytes {
 public:
  constexpr Bytes() = default;
  constexpr explicit Bytes(uint64_t count) : count_(count) {}

  constexpr uint64_t count() const { return count_; }
  constexpr double in_gib() const { return static_cast<double>(count_) / (1ULL << 30); }

  friend constexpr Bytes operator+(Bytes a, Bytes b) { return Bytes(a.count_ + b.count_); }
  friend constexpr Bytes operator-(Bytes a, Bytes b) { return Bytes(a.count_ - b.count_); }
  friend constexpr bool operator==(Bytes a, Bytes b) { return a.count_ == b.count_; }
  friend constexpr bool operator!=(Bytes a, Bytes b) { return a.count_ != b.count_; }
  friend constexpr bool operator<(Bytes a, Bytes b) { return a.count_ < b.count_; }
  friend constexpr bool operator>(Bytes a, Bytes b) { return a.count_ > b.count_; }
  friend constexpr bool operator<=(Bytes a, Bytes b) { return a.count_ <= b.count_; }
  friend constexpr bool operator>=(Bytes a, Bytes b) { return a.count_ >= b.count_; }

 private:
  uint64_t count_ = 0;
};

// Sums and differences that stop at the ends of the range, where `+` and `-` would wrap around.
constexpr Bytes saturated_sum(Bytes a, Bytes b) {
  return b.count() > UINT64_MAX - a.count() ? Bytes(UINT64_MAX) : a + b;
}
constexpr Bytes difference_or_zero(Bytes a, Bytes b) { return a > b ? a - b : Bytes(0); }

// Up to the next multiple of `unit`.
constexpr uint64_t round_up(uint64_t size, uint64_t unit) {
  return (size + unit - 1) / unit * unit;
}
constexpr Bytes round_up(Bytes size, Bytes unit) {
  return Bytes(round_up(size.count(), unit.count()));
}

constexpr Bytes mib(uint64_t n) { return Bytes(n << 20); }
constexpr Bytes gib(uint64_t n) { return Bytes(n << 30); }

}  // namespace egm
