// Which extended segments exist, found by address. Pure bookkeeping.
#pragma once

#include <cstdint>
#include <map>
#include <mutex>
#include <optional>
#include <vector>

#include "core/placement.h"
#include "core/units.h"

namespace egm {

enum class SegmentOwner { kTorch, kPair };

// One piece of memory as its backing gave it: what torch's allocator carves into blocks, or what
// the C pair hands out whole.
struct Segment {
  void* base = nullptr;
  Bytes size;
  DeviceIndex device = 0;
  Placement placement;
  SegmentOwner owner = SegmentOwner::kTorch;
  // The CUDA stream that torch gave it to; its last work there may still run when it is released.
  void* stream = nullptr;
};

class SegmentTable {
 public:
  void insert(const Segment& segment);
  // The segment that starts at `base`, removed from the table; nothing if there is none.
  std::optional<Segment> take(const void* base);
  // The segment that contains `address`.
  std::optional<Segment> find(const void* address) const;
  std::vector<Segment> all() const;

 private:
  mutable std::mutex mutex_;
  std::map<uintptr_t, Segment> by_base_;
};

}  // namespace egm
