// The pools that others (CUDA graphs, torch.cuda.use_mem_pool) are recording to on one device.
#pragma once

#include <c10/cuda/CUDACachingAllocator.h>

#include <algorithm>
#include <atomic>
#include <functional>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

namespace egm {

// Note [User pools win]
// ~~~~~~~~~~~~~~~~~~~~~
// torch asks the newest recording first whether a request is its own. A diversion is always the
// newest, so it would take memory that belongs to a graph or to a user's pool. Hence nothing is
// diverted that a recording of somebody else claims.
class UserRecordings {
 public:
  using Filter = std::function<bool(cudaStream_t)>;

  void add(c10::MempoolId_t id, Filter filter) {
    replace([&](List& list) { list.emplace_back(id, std::move(filter)); });
  }

  // False if there was none.
  bool remove(c10::MempoolId_t id) {
    bool found = false;
    replace([&](List& list) {
      const auto kept = std::remove_if(list.begin(), list.end(),
                                       [&](const auto& entry) { return entry.first == id; });
      found = kept != list.end();
      list.erase(kept, list.end());
    });
    return found;
  }

  bool any() const { return count_.load(std::memory_order_acquire) != 0; }

  bool claim(cudaStream_t stream) const {
    if (!any()) return false;
    // Filters are foreign code: they are asked on a snapshot, outside our lock.
    std::shared_ptr<const List> list;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      list = list_;
    }
    return std::any_of(list->begin(), list->end(),
                       [&](const auto& entry) { return entry.second(stream); });
  }

 private:
  using List = std::vector<std::pair<c10::MempoolId_t, Filter>>;

  template <typename Change>
  void replace(Change&& change) {
    std::lock_guard<std::mutex> lock(mutex_);
    auto next = std::make_shared<List>(*list_);
    change(*next);
    count_.store(next->size(), std::memory_order_release);
    list_ = std::move(next);
  }

  mutable std::mutex mutex_;
  std::shared_ptr<const List> list_ = std::make_shared<const List>();
  std::atomic<size_t> count_{0};
};

}  // namespace egm
