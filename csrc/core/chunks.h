// How a range of memory that is in part in HBM and in part on the host is divided, and which parts
// come to HBM first. Pure.
#pragma once

#include <cstddef>
#include <optional>
#include <vector>

#include "core/config.h"
#include "core/units.h"

namespace egm {

class Chunks {
 public:
  // Of one size, a multiple of `unit`; at most about a thousand. With a stock whose pieces are
  // `piece` they are of that size, but in a range whose head is in HBM only those of its tail, and
  // the rest that is too small for a piece: so the head is rounded by little though pieces are
  // large.
  Chunks(Bytes size, Bytes device_part, SplitLayout layout, Bytes unit, std::optional<Bytes> piece);

  size_t count() const { return order_.size(); }
  Bytes total() const { return edges_.back(); }
  Bytes start(size_t chunk) const { return edges_[chunk]; }
  Bytes size(size_t chunk) const { return edges_[chunk + 1] - edges_[chunk]; }
  // The chunk that is the rank-th to come to HBM, and the first but so many to leave it.
  size_t at_rank(size_t rank) const { return order_[rank]; }
  // How many chunks, in that order, `part` bytes of HBM hold; all if it is the whole range, though
  // the last chunk may be larger than what is left for it.
  size_t within(Bytes part) const;
  // The bytes of the first `count` in that order.
  Bytes first(size_t count) const;

 private:
  const Bytes size_;
  // Where chunks begin, and where the last one ends.
  std::vector<Bytes> edges_{Bytes(0)};
  std::vector<size_t> order_;
};

}  // namespace egm
