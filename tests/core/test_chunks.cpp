// How ranges are divided, and which chunks come to HBM first.
#include <string>
#include <vector>

#include "checks.h"
#include "core/chunks.h"

namespace {

using namespace egm;

constexpr Bytes kUnit = mib(2);

std::vector<uint64_t> sizes_in_mib(const Chunks& chunks) {
  std::vector<uint64_t> sizes;
  for (size_t chunk = 0; chunk < chunks.count(); ++chunk) {
    sizes.push_back(chunks.size(chunk).count() >> 20);
  }
  return sizes;
}

// Every range: chunks follow each other, each has one rank, and sums agree.
void holds(const Chunks& chunks, Bytes size, const std::string& what) {
  std::vector<bool> seen(chunks.count());
  Bytes end;
  for (size_t chunk = 0; chunk < chunks.count(); ++chunk) {
    expect(chunks.start(chunk) == end, what + ": no gap");
    expect(chunks.size(chunk).count() % kUnit.count() == 0, what + ": whole units");
    end = end + chunks.size(chunk);
    seen[chunks.at_rank(chunk)] = true;
  }
  for (const bool each : seen) expect(each, what + ": every chunk has a rank");
  expect(end == chunks.total() && end >= size, what + ": covers the range");
  expect(chunks.first(chunks.count()) == end, what + ": all of them");
  expect(chunks.within(Bytes(0)) == 0, what + ": none");
  expect(chunks.within(size) == chunks.count(), what + ": all is all");
  for (size_t count = 0; count < chunks.count(); ++count) {
    const Bytes part = chunks.first(count);
    if (part < size) expect(chunks.within(part) == count, what + ": within() undoes first()");
    if (part > Bytes(0) && part <= size) {
      expect(chunks.within(part - Bytes(1)) < count, what + ": a byte less holds one less");
    }
  }
}

void chunks_are_of_one_size() {
  const Chunks small(mib(9), mib(4), SplitLayout::kSpread, kUnit, std::nullopt);
  expect(sizes_in_mib(small) == std::vector<uint64_t>{2, 2, 2, 2, 2}, "units");
  const Chunks large(gib(4), gib(2), SplitLayout::kHead, kUnit, std::nullopt);
  expect(large.count() == 1024 && large.size(7) == mib(4), "about a thousand at most");
  const Chunks pieces(mib(20), mib(8), SplitLayout::kSpread, kUnit, mib(6));
  expect(sizes_in_mib(pieces) == std::vector<uint64_t>{6, 6, 6, 6}, "pieces of the stock");
}

void tail_is_in_pieces_of_the_stock() {
  const Chunks chunks(mib(41), mib(11), SplitLayout::kHead, kUnit, mib(12));
  expect(sizes_in_mib(chunks) == std::vector<uint64_t>{2, 2, 2, 2, 2, 12, 12, 8}, "head, tail");
  expect(chunks.within(mib(11)) == 5, "the head as asked, rounded down");
  const Chunks none(mib(24), Bytes(0), SplitLayout::kHead, kUnit, mib(12));
  expect(sizes_in_mib(none) == std::vector<uint64_t>{12, 12}, "nothing in HBM");
}

void spread_ones_alternate() {
  const Chunks chunks(mib(16), mib(8), SplitLayout::kSpread, kUnit, std::nullopt);
  std::vector<size_t> in_hbm;
  for (size_t rank = 0; rank < chunks.within(mib(8)); ++rank) {
    in_hbm.push_back(chunks.at_rank(rank));
  }
  expect(in_hbm == std::vector<size_t>{0, 4, 2, 6}, "every second one");
}

}  // namespace

int main() {
  chunks_are_of_one_size();
  tail_is_in_pieces_of_the_stock();
  spread_ones_alternate();
  for (const uint64_t size : {1ULL, 3ULL << 20, 41ULL << 20, (41ULL << 20) + 5, 5ULL << 30}) {
    for (const double fraction : {0.0, 0.3, 0.99}) {
      const Bytes part(static_cast<uint64_t>(fraction * static_cast<double>(size)));
      for (const SplitLayout layout : {SplitLayout::kHead, SplitLayout::kSpread}) {
        for (const auto piece :
             {std::optional<Bytes>(), std::optional(mib(2)), std::optional(mib(16))}) {
          holds(Chunks(Bytes(size), part, layout, kUnit, piece), Bytes(size),
                std::to_string(size) + " bytes");
        }
      }
    }
  }
  return exit_status();
}
