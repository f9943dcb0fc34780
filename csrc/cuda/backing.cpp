// Which backing serves a placement.
#include "cuda/backing.h"

namespace egm {

Backing& backing_of(BackingKind kind) {
  return kind == BackingKind::kDevice ? device_backing() : managed_backing();
}

}  // namespace egm
