// Dividing a range.
#include "core/chunks.h"

#include <algorithm>
#include <numeric>

namespace egm {
namespace {

// Of a range at most, so that a huge one is up in reasonable time; arbitrary.
constexpr uint64_t kMostChunks = 1024;

// Those at its end are on the host. Counting with the bits of an index reversed spreads any number
// of the last ones evenly over all.
std::vector<size_t> order_of(size_t chunks, SplitLayout layout) {
  std::vector<size_t> order(chunks);
  std::iota(order.begin(), order.end(), size_t{0});
  if (layout == SplitLayout::kHead) return order;
  unsigned bits = 0;
  while ((size_t{1} << bits) < chunks) ++bits;
  std::vector<size_t> reversed(chunks);
  for (size_t index = 0; index < chunks; ++index) {
    for (unsigned bit = 0; bit < bits; ++bit) {
      if ((index >> bit & 1) != 0) reversed[index] |= size_t{1} << (bits - 1 - bit);
    }
  }
  std::sort(order.begin(), order.end(),
            [&](size_t left, size_t right) { return reversed[left] < reversed[right]; });
  return order;
}

}  // namespace

Chunks::Chunks(Bytes size, Bytes device_part, SplitLayout layout, Bytes unit,
               std::optional<Bytes> piece)
    : size_(size) {
  const Bytes chunk = round_up(Bytes(std::max<uint64_t>(1, size.count() / kMostChunks)), unit);
  const auto add = [this](Bytes each, Bytes up_to) {
    while (total() + each <= up_to) edges_.push_back(total() + each);
  };
  if (piece && layout == SplitLayout::kHead) {
    add(chunk, std::min(device_part, size));
    add(*piece, size);
    const Bytes rest = round_up(size - total(), unit);
    if (rest > Bytes(0)) edges_.push_back(total() + rest);
  } else {
    const Bytes each = piece.value_or(chunk);
    add(each, round_up(size, each));
  }
  order_ = order_of(edges_.size() - 1, layout);
}

size_t Chunks::within(Bytes part) const {
  if (part >= size_) return count();
  size_t found = 0;
  Bytes sum;
  while (found < count() && sum + size(order_[found]) <= part) {
    sum = sum + size(order_[found++]);
  }
  return found;
}

Bytes Chunks::first(size_t count) const {
  Bytes sum;
  for (size_t rank = 0; rank < count; ++rank) sum = sum + size(order_[rank]);
  return sum;
}

}  // namespace egm
