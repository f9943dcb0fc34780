// The decision for one request, for both modes.
#include "core/placement.h"

namespace egm {

std::optional<Placement> place(const Request& request, const Config& config) {
  if (request.size.count() == 0 || !config.acts_on(request.device)) return std::nullopt;
  const bool large = request.size >= config.threshold;
  Placement placement;
  placement.advice = config.advice;
  switch (config.mode) {
    case Mode::kTiered:
      if (!large) return std::nullopt;
      placement.backing = config.backing;
      break;
    case Mode::kManaged:
      placement.backing = BackingKind::kManaged;
      // By the size of the request, never of its segment: torch serves a 5 MiB request from a
      // 20 MiB segment.
      placement.prefetch = config.prefetch && !large;
      break;
  }
  // Advice means nothing to plain device memory; one spelling of it keeps one set of pools.
  if (placement.backing == BackingKind::kDevice) placement.advice = Advice{};
  return placement;
}

Bytes smallest_extended(const Config& config) {
  return config.mode == Mode::kManaged ? Bytes(1) : config.threshold;
}

int size_class(Bytes size) {
  int power = 0;
  for (uint64_t gibs = size.count() >> 30; gibs != 0; gibs >>= 1) ++power;
  return power;
}

}  // namespace egm
