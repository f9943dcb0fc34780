// A range of anonymous host memory in huge pages, and how it comes up in parallel.
// System calls only; nothing here touches CUDA.
#pragma once

#include <string>

#include "core/range_plan.h"
#include "core/units.h"

namespace egm {

// The kernel's. `root` goes before /sys; the ordinary page is this kernel's always.
PageSizes page_sizes(const std::string& root = "");

class HostRange {
 public:
  // Reserves addresses, aligned by alignment_for(); no memory yet. Throws std::system_error.
  explicit HostRange(Bytes size);
  ~HostRange();
  HostRange(const HostRange&) = delete;
  HostRange& operator=(const HostRange&) = delete;

  void* base() const { return base_; }
  // Memory from this NUMA node, or from others once it is full. False if the kernel refuses.
  bool prefer_node(int node) noexcept;
  // Backs all of it with memory now. Throws std::system_error if the kernel has too little.
  void populate();
  // Leaves the range to the caller, who ends it with free_host_range().
  void* leave() noexcept;

 private:
  void* base_ = nullptr;
  Bytes size_;
};

void free_host_range(void* base, Bytes size) noexcept;

}  // namespace egm
