// Alignment, and division into parts.
#include "core/range_plan.h"

#include <algorithm>

namespace egm {

Bytes alignment_for(Bytes size, const PageSizes& pages) {
  return size < pages.huge ? pages.page : pages.huge;
}

std::vector<RangePart> parts_for(Bytes size, const PageSizes& pages) {
  // Arbitrary: large enough that threads rarely meet, small enough that they end together.
  constexpr Bytes kPart = mib(64);
  std::vector<RangePart> parts;
  for (Bytes offset; offset < size;) {
    const Bytes left = size - offset;
    // What is left below a huge page has ordinary ones.
    const Bytes part = left < pages.huge ? kPart : std::max(kPart, pages.huge);
    parts.push_back({offset, std::min(part, left)});
    offset = offset + parts.back().size;
  }
  return parts;
}

}  // namespace egm
