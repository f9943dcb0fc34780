// Which extended segments exist, found by address.
#include "core/segment_table.h"

namespace egm {

void SegmentTable::insert(const Segment& segment) {
  std::lock_guard<std::mutex> lock(mutex_);
  by_base_[reinterpret_cast<uintptr_t>(segment.base)] = segment;
}

std::optional<Segment> SegmentTable::take(const void* base) {
  std::lock_guard<std::mutex> lock(mutex_);
  const auto it = by_base_.find(reinterpret_cast<uintptr_t>(base));
  if (it == by_base_.end()) return std::nullopt;
  Segment segment = it->second;
  by_base_.erase(it);
  return segment;
}

std::optional<Segment> SegmentTable::find(const void* address) const {
  const auto key = reinterpret_cast<uintptr_t>(address);
  std::lock_guard<std::mutex> lock(mutex_);
  auto it = by_base_.upper_bound(key);
  if (it == by_base_.begin()) return std::nullopt;
  --it;
  if (key - it->first >= it->second.size.count()) return std::nullopt;
  return it->second;
}

std::vector<Segment> SegmentTable::all() const {
  std::lock_guard<std::mutex> lock(mutex_);
  std::vector<Segment> segments;
  segments.reserve(by_base_.size());
  for (const auto& [base, segment] : by_base_) segments.push_back(segment);
  return segments;
}

}  // namespace egm
