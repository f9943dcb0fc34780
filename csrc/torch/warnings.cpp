// Warnings for hints that failed.
#include "torch/warnings.h"

#include <c10/util/Exception.h>

#include "cuda/errors.h"

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

void warn_of_spill(const Request& request, BackingKind backing) {
  TORCH_WARN_ONCE("egm_alloc: the HBM of device ", request.device, " could not hold ",
                  describe(request.size), ", which is now in '", to_string(backing),
                  "' host memory: the GPU reads it over the link, slower than HBM. Place large "
                  "tensors that are used seldom with egm_alloc.place(), use smaller batches, or "
                  "set spill=False for an OutOfMemoryError instead. Further spills are only "
                  "counted (egm_alloc.stats().extended['",
                  to_string(backing), "'].spills).");
}

}  // namespace egm
