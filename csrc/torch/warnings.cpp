// Warnings for hints that failed.
#include "torch/warnings.h"

#include <c10/util/Exception.h>
#include <c10/util/StringUtil.h>

#include <atomic>

#include "cuda/errors.h"

namespace egm {
namespace {

// As TORCH_WARN_ONCE: torch.set_warn_always() has it said each time.
template <typename... Parts>
void say_once(std::atomic<bool>& said, const Parts&... parts) {
  if (said.exchange(true) && !c10::WarningUtils::get_warnAlways()) return;
  if (warning_hook() != nullptr) warning_hook()(c10::str("egm_alloc: ", parts...));
}

}  // namespace

WarningHook& warning_hook() {
  static WarningHook hook = nullptr;
  return hook;
}

void warn_once(const Diversion::Problems& problems) {
  if (!problems.advice_failure.empty()) {
    static std::atomic<bool> said{false};
    say_once(said, problems.advice_failure,
             ". The memory is usable, without this advice; further failures are only counted "
             "(egm_alloc.stats().extended['managed'].advice_failures).");
  }
  if (!problems.prefetch_failure.empty()) {
    static std::atomic<bool> said{false};
    say_once(said, problems.prefetch_failure,
             ". Pages migrate on first touch instead; further failures are only counted "
             "(egm_alloc.stats().extended['managed'].prefetch_failures).");
  }
  if (!problems.pool_failure.empty()) {
    static std::atomic<bool> said{false};
    say_once(said, "torch refused to end a diversion: ", problems.pool_failure);
  }
}

void warn_of_spill(const Request& request, BackingKind backing) {
  static std::atomic<bool> said{false};
  say_once(said, "the HBM of device ", request.device, " could not hold ", describe(request.size),
           ", which is now in '", to_string(backing),
           "' host memory: the GPU reads it over the link, slower than HBM. Place large tensors "
           "that are used seldom with egm_alloc.place(), use smaller batches, or set spill=False "
           "for an OutOfMemoryError instead. Further spills are only counted "
           "(egm_alloc.stats().extended['",
           to_string(backing), "'].spills).");
}

}  // namespace egm
