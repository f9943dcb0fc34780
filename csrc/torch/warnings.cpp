// Warnings for hints that failed.
#include "torch/warnings.h"

#include <c10/util/Exception.h>

namespace egm {

void warn_once(const Diversion::Problems& problems) {
  if (!problems.advice_failure.empty()) {
    TORCH_WARN_ONCE("egm_alloc: ", problems.advice_failure,
                    ". The memory is usable, without this advice; further failures are only "
                    "counted (egm_alloc.stats().extended['managed'].advice_failures).");
  }
  if (!problems.prefetch_failure.empty()) {
    TORCH_WARN_ONCE("egm_alloc: ", problems.prefetch_failure,
                    ". Pages migrate on first touch instead; further failures are only counted "
                    "(egm_alloc.stats().extended['managed'].prefetch_failures).");
  }
  if (!problems.pool_failure.empty()) {
    TORCH_WARN_ONCE("egm_alloc: torch refused to end a diversion: ", problems.pool_failure);
  }
}

}  // namespace egm
