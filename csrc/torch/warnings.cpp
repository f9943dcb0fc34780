// Warnings for hints that failed.
#include "torch/warnings.h"

#include <c10/util/Exception.h>

namespace egm {

void warn_once(const Diversion& diversion) {
  if (!diversion.advice_failure.empty()) {
    TORCH_WARN_ONCE("egm_alloc: ", diversion.advice_failure,
                    ". The memory is usable, without this advice; further failures are only "
                    "counted (egm_alloc.stats().extended['managed'].advice_failures).");
  }
  if (!diversion.prefetch_failure.empty()) {
    TORCH_WARN_ONCE("egm_alloc: ", diversion.prefetch_failure,
                    ". Pages migrate on first touch instead; further failures are only counted "
                    "(egm_alloc.stats().extended['managed'].prefetch_failures).");
  }
  if (!diversion.pool_failure.empty()) {
    TORCH_WARN_ONCE("egm_alloc: torch refused to end a diversion: ", diversion.pool_failure);
  }
}

}  // namespace egm
