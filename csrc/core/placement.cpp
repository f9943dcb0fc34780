// The decision for one request.
#include "core/placement.h"

namespace egm {

namespace {

BackingKind resolve(std::optional<BackingKind> backing, const Request& request,
                    AutoBacking auto_backing) {
  return backing ? *backing : auto_backing(request.device);
}

bool can_serve(BackingKind backing, const Request& request) {
  return backing != BackingKind::kSplit || request.size >= kLeastSplit;
}

Placement on_backing(BackingKind backing, const Request& request, const Config& config,
                     double device_fraction) {
  Placement placement;
  placement.backing = backing;
  // Advice means nothing to other memory; one spelling of it keeps one set of pools.
  if (backing == BackingKind::kManaged) placement.advice = config.advice;
  if (backing == BackingKind::kSplit) {
    placement.device_fraction = device_fraction;
    placement.exact_size = request.size;
  }
  return placement;
}

}  // namespace

std::optional<Placement> place(const Request& request, const Config& config,
                               const PlaceScope* scope, AutoBacking auto_backing) {
  if (request.size.count() == 0) return std::nullopt;
  const bool large = request.size >= config.threshold;
  if (scope != nullptr && request.size >= scope->min_bytes) {
    const BackingKind kind = resolve(scope->backing, request, auto_backing);
    if (!can_serve(kind, request)) return std::nullopt;
    Placement placement = on_backing(kind, request, config, scope->device_fraction);
    if (kind == BackingKind::kSplit) placement.layout = scope->layout;
    placement.prefetch = kind == BackingKind::kManaged && config.prefetch && !large;
    placement.tag = scope->tag;
    return placement;
  }
  if (!config.acts_on(request.device)) return std::nullopt;
  if (config.mode == Mode::kManaged) {
    Placement placement = on_backing(BackingKind::kManaged, request, config, 0);
    // By the size of the request, never of its segment: torch serves a 5 MiB request from a
    // 20 MiB segment.
    placement.prefetch = config.prefetch && !large;
    return placement;
  }
  if (!large) return std::nullopt;
  const BackingKind kind = resolve(config.backing, request, auto_backing);
  if (!can_serve(kind, request)) return std::nullopt;
  return on_backing(kind, request, config, config.device_fraction);
}

std::optional<Placement> spill_placement(const Request& request, const Config& config,
                                         AutoBacking auto_backing) {
  if (!config.spill || !config.acts_on(request.device)) return std::nullopt;
  BackingKind kind = resolve(config.backing, request, auto_backing);
  if (!is_on_host(kind)) kind = BackingKind::kPinned;
  Placement placement = on_backing(kind, request, config, 0);
  placement.spilled = true;
  return placement;
}

Bytes smallest_extended(const Config& config) {
  return config.mode == Mode::kManaged ? Bytes(1) : config.threshold;
}

Bytes device_share(Bytes size, double device_fraction) {
  return Bytes(static_cast<uint64_t>(static_cast<double>(size.count()) * device_fraction));
}

Bytes host_share(Bytes size, const Placement& placement) {
  if (is_on_host(placement.backing)) return size;
  if (placement.backing == BackingKind::kSplit) {
    return size - device_share(size, placement.device_fraction);
  }
  return Bytes(0);
}

Bytes extended_share(Bytes size, const Placement& placement) {
  return placement.backing == BackingKind::kManaged ? size : host_share(size, placement);
}

int size_class(Bytes size) {
  int power = 0;
  for (uint64_t gibs = size.count() >> 30; gibs != 0; gibs >>= 1) ++power;
  return power;
}

}  // namespace egm
