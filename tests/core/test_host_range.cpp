// How pinned memory comes up, planned for kernels with pages of all sizes, and done on this one.
#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <string>
#include <system_error>
#include <vector>

#include "checks.h"
#include "core/host_range.h"
#include "core/kernel_files.h"
#include "core/page_nodes.h"
#include "fake_root.h"

namespace {

using namespace egm;

constexpr Bytes kib(uint64_t n) { return Bytes(n << 10); }

constexpr PageSizes kSmall{kib(4), mib(2)};
constexpr PageSizes kMiddle{kib(16), mib(32)};
constexpr PageSizes kLarge{kib(64), mib(512)};
constexpr PageSizes kNoHuge{kib(64), kib(64)};
constexpr PageSizes kAll[] = {kSmall, kMiddle, kLarge, kNoHuge};

bool in_whole(Bytes unit, Bytes size) { return size.count() % unit.count() == 0; }

std::string in_words(Bytes size, const PageSizes& pages) {
  return std::to_string(size.count()) + " bytes in pages of " +
         std::to_string(pages.page.count() >> 10) + " KiB: ";
}

std::vector<Bytes> sizes_around(const PageSizes& pages) {
  std::vector<Bytes> sizes{mib(20), mib(448), gib(3) + mib(100) + pages.page};
  for (const Bytes unit : {mib(2), mib(64), pages.huge, gib(1)}) {
    for (const Bytes size : {unit - pages.page, unit, unit + pages.page}) sizes.push_back(size);
  }
  return sizes;
}

void ranges_are_aligned_to_a_huge_page_if_one_fits() {
  for (const auto& pages : kAll) {
    const std::string what = in_words(pages.huge, pages);
    expect(alignment_for(pages.page, pages) == pages.page, what + "a page");
    expect(alignment_for(pages.huge, pages) == pages.huge, what + "one");
    expect(alignment_for(pages.huge + pages.page, pages) == pages.huge, what + "more than one");
    expect(alignment_for(gib(3), pages) == pages.huge, what + "many");
  }
  for (const auto& pages : {kSmall, kMiddle, kLarge}) {
    expect(alignment_for(pages.huge - pages.page, pages) == pages.page,
           in_words(pages.huge, pages) + "a page less");
  }
  expect(alignment_for(mib(2), kSmall) == mib(2), "2 MiB");
  expect(alignment_for(mib(2), kMiddle) == kib(16), "2 MiB below a huge page of 32 MiB");
  expect(alignment_for(mib(2), kLarge) == kib(64), "2 MiB below a huge page of 512 MiB");
}

void parts_cover_the_range_and_share_no_huge_page() {
  for (const auto& pages : kAll) {
    for (const Bytes size : sizes_around(pages)) {
      const std::string what = in_words(size, pages);
      const Bytes huge_end(size.count() / pages.huge.count() * pages.huge.count());
      Bytes end;
      for (const auto& [offset, part] : parts_for(size, pages)) {
        const bool huge = offset < huge_end;
        const std::string which = what + "part at " + std::to_string(offset.count());
        expect(offset == end && part > Bytes(0), which + " follows the last");
        expect(in_whole(huge ? pages.huge : pages.page, offset),
               which + " begins where a page does");
        expect(part <= (huge ? std::max(mib(64), pages.huge) : mib(64)),
               which + " is not too large");
        end = offset + part;
      }
      expect(end == size, what + "all of it");
    }
  }
}

void as_many_threads_help_as_huge_pages_let() {
  const auto expect_parts = [](const PageSizes& pages, Bytes size, size_t parts) {
    const size_t got = parts_for(size, pages).size();
    expect(got == parts, in_words(size, pages) + std::to_string(got) + " parts");
  };
  for (const auto& pages : kAll) {
    expect_parts(pages, Bytes(0), 0);
    expect_parts(pages, mib(2), 1);
    expect_parts(pages, mib(64), 1);
    expect_parts(pages, mib(64) + pages.page, 2);
    expect_parts(pages, mib(448), 7);
  }
  for (const auto& pages : {kSmall, kMiddle, kNoHuge}) expect_parts(pages, gib(1), 16);
  expect_parts(kLarge, mib(512), 1);
  expect_parts(kLarge, gib(1), 2);
  expect_parts(kLarge, gib(1) + mib(130), 5);
}

void huge_pages_are_as_large_as_the_kernel_says() {
  const Bytes page(static_cast<uint64_t>(sysconf(_SC_PAGESIZE)));
  FakeRoot root;
  const auto huge = [&root] { return page_sizes(root.path()).huge; };
  expect(huge() == page, "a kernel without them");
  const std::string file = "/sys/kernel/mm/transparent_hugepage/hpage_pmd_size";
  for (const Bytes size : {mib(2), mib(32), mib(512)}) {
    root.write(file, std::to_string(size.count()) + "\n");
    expect(huge() == size, "as the file has it");
  }
  for (const char* junk : {"", "x", "0", "-1", "1024"}) {
    root.write(file, junk);
    expect(huge() == page, "junk " + std::string(junk));
  }
  expect(page_sizes(root.path()).page == page, "the page is this kernel's");
}

Bytes mapped_now() {
  const auto pages = parse_number(split(read_text("/proc/self/statm").value_or(""), ' ').front());
  return Bytes(pages.value_or(0) * page_sizes().page.count());
}

// What the kernel says of the mapping from `base` up to `end`; nothing if there is none such.
std::string flags_of(const void* base, Bytes size) {
  const auto start = reinterpret_cast<uintptr_t>(base);
  char range[48];
  std::snprintf(range, sizeof range, "%08lx-%08lx ", start, start + size.count());
  const std::string wanted = range;
  const std::string key = "VmFlags:";
  bool here = false;
  for (const auto& line : split(read_text("/proc/self/smaps").value_or(""), '\n')) {
    here = here || line.compare(0, wanted.size(), wanted) == 0;
    if (here && line.compare(0, key.size(), key) == 0) return line.substr(key.size()) + " ";
  }
  return "";
}

void small_ranges_need_no_room_for_a_huge_page() {
  rlimit before{};
  getrlimit(RLIMIT_AS, &before);
  const Bytes limit = mapped_now() + mib(1) + kib(512);
  const rlimit tight{limit.count(), before.rlim_max};
  expect(setrlimit(RLIMIT_AS, &tight) == 0, "a limit on addresses");
  try {
    HostRange range(mib(1));
    range.populate();
  } catch (const std::system_error& error) {
    expect(false, std::string("1 MiB within 1.5 MiB: ") + error.what());
  }
  setrlimit(RLIMIT_AS, &before);
}

void ranges_are_advised_populated_and_given_back() {
  const auto [page, huge] = page_sizes();
  const Bytes size = huge + mib(3) + Bytes(1);
  const Bytes before = mapped_now();
  HostRange range(size);
  expect(mapped_now() < before + size + mib(1), "no more addresses than asked for");
  expect(reinterpret_cast<uintptr_t>(range.base()) % huge.count() == 0, "aligned to a huge page");
  const std::string flags = flags_of(range.base(), round_up(size, page));
  expect(huge == page || flags.find(" hg ") != std::string::npos, "in huge pages, not" + flags);
  expect(flags.find(" dc ") != std::string::npos, "not for children, but" + flags);
  const auto on_nodes = [&] {
    Bytes sum;
    for (const auto& [node, bytes] : page_nodes(range.base(), size).by_node) sum = sum + bytes;
    return sum;
  };
  expect(on_nodes() == Bytes(0), "no memory before it is populated");
  range.prefer_node(0);
  range.populate();
  expect(on_nodes() >= size, "all of it is backed");
  expect(!range.prefer_node(-1) && !range.prefer_node(1 << 20), "no such node");
  void* const base = range.leave();
  expect(base != nullptr && range.base() == nullptr, "left to the caller");
  const Bytes full = mapped_now();
  free_host_range(base, size);
  expect(full - mapped_now() == round_up(size, page), "all of it is given back");
}

}  // namespace

int main() {
  ranges_are_aligned_to_a_huge_page_if_one_fits();
  parts_cover_the_range_and_share_no_huge_page();
  as_many_threads_help_as_huge_pages_let();
  huge_pages_are_as_large_as_the_kernel_says();
  small_ranges_need_no_room_for_a_huge_page();
  ranges_are_advised_populated_and_given_back();
  return exit_status();
}
