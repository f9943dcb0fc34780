"""One process of the comparison: sets one allocator up and times batches on request.

    python -m benchmarks.worker SETUP [LIBRARY]   # the pair's, if it is not this package's own

Reads the name of a row per line; answers each with the seconds of one batch, or "skipped". An empty
line makes it forget the row before. While it counts, the caller lets only one process work.
"""

from __future__ import annotations

import gc
import sys

import torch

from benchmarks import rows

LOW_THRESHOLD_GIB = 0.0625
LARGE = 64 * rows.MIB  # at that threshold
STEPS = ("training step", "inference step")
ALLOCATIONS = tuple(f"alloc {size}" for size in rows.ALLOCATION_SIZES)
SMALL_THREADS = "8 threads, small"
NINTH_THREAD = "8 threads, small; ninth 64 MiB"
EVERY_ROW = (*ALLOCATIONS, *STEPS, SMALL_THREADS, NINTH_THREAD)

# Each setup is a process of its own; native torch runs without egm_alloc being imported. What a
# second native process is off the first by is chance: as much means nothing elsewhere either.
SETUPS: dict[str, tuple[str, ...]] = {
    "native": EVERY_ROW,
    "native again": STEPS,
    "tiered": (*ALLOCATIONS[:3], *STEPS, SMALL_THREADS),
    "low threshold": (*ALLOCATIONS[2:], NINTH_THREAD),
    "managed": STEPS,
    "managed, recorded": EVERY_ROW,
    "pair": (*ALLOCATIONS, *STEPS),
}


def _set_up(setup: str, pair: str | None) -> None:
    if setup in ("native", "native again"):
        return
    if setup == "pair" and pair is not None:
        allocator = torch.cuda.memory.CUDAPluggableAllocator(pair, "managed_malloc", "managed_free")
        torch.cuda.memory.change_current_allocator(allocator)
        return
    import egm_alloc

    if setup == "tiered":
        egm_alloc.enable()
    elif setup == "low threshold":
        egm_alloc.enable(threshold_gib=LOW_THRESHOLD_GIB)
    elif setup == "managed":
        egm_alloc.enable(mode="managed")
    elif setup == "managed, recorded":
        egm_alloc.enable(mode="managed")
        torch.empty(1024, device="cuda").record_stream(torch.cuda.Stream())
    elif setup == "pair":
        torch.cuda.memory.change_current_allocator(egm_alloc.pluggable_allocator())
    else:
        raise ValueError(f"unknown setup {setup!r}")


def _prepare(setup: str, row: str) -> rows.Batch | None:
    cached = setup != "pair"
    size = rows.ALLOCATION_SIZES.get(row.removeprefix("alloc "))
    if size is not None:
        # More managed memory than is free can slow a GPU down for everybody on it, and all who
        # have this row hold theirs at once.
        holders = sum(row in each for each in SETUPS.values())
        if holders * size > torch.cuda.mem_get_info()[0] // 2:
            return None
        return rows.allocation(size, cached)
    if row in STEPS:
        return rows.training(cached) if row == STEPS[0] else rows.inference(cached)
    return rows.threads(LARGE if row == NINTH_THREAD else None)


def serve(setup: str, pair: str | None = None) -> None:
    """Answer requests until the input ends."""
    _set_up(setup, pair)
    prepared: tuple[str, rows.Batch | None] = ("", None)
    for line in sys.stdin:
        row = line.rstrip("\n")
        if row != prepared[0]:
            prepared = ("", None)
            gc.collect()
            if setup != "pair":  # a pluggable allocator has no cache to empty
                torch.cuda.empty_cache()
            if row:
                prepared = (row, _prepare(setup, row))
        batch = prepared[1]
        print("skipped" if batch is None else batch(), flush=True)


if __name__ == "__main__":
    serve(*sys.argv[1:])
