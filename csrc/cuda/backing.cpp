// Which backing serves a placement.
#include "cuda/backing.h"

namespace egm {

Backing& backing_of(BackingKind kind) {
  switch (kind) {
    case BackingKind::kDevice:
      return device_backing();
    case BackingKind::kPinned:
      return pinned_backing();
    case BackingKind::kNuma:
      return numa_backing();
    case BackingKind::kSplit:
      return split_backing();
    case BackingKind::kManaged:
      break;
  }
  return managed_backing();
}

}  // namespace egm
