// How a range of host memory is laid out and brought up in parallel. Pure; sizes of ranges are in
// whole pages.
#pragma once

#include <vector>

#include "core/units.h"

namespace egm {

struct PageSizes {
  Bytes page;
  // The kernel's transparent huge page (2 MiB; 32 MiB with pages of 16 KiB, 512 MiB with pages of
  // 64 KiB), or its page if it has none. All are powers of two.
  Bytes huge;
};

struct RangePart {
  Bytes offset;
  Bytes size;
};

// A huge page if one fits. A range below has ordinary pages wherever it is, and to align it would
// take as many addresses as a huge page, and its own page of page tables.
Bytes alignment_for(Bytes size, const PageSizes& pages);

// What one thread backs with memory at a time. No huge page is in two parts: two threads would
// both clear one, and one of them give it back.
std::vector<RangePart> parts_for(Bytes size, const PageSizes& pages);

}  // namespace egm
