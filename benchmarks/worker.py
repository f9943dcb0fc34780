"""One process of the comparison: sets one allocator up, times its rows, prints them as JSON lines.

Each line is ``{"setup": ..., "row": ..., "seconds": ...}``.
"""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Callable, Iterator

import torch

from benchmarks import rows

LOW_THRESHOLD_GIB = 0.0625
LARGE = 64 * rows.MIB  # at that threshold
STEPS = ("training step", "inference step")
ALLOCATIONS = tuple(f"alloc {size}" for size in rows.ALLOCATION_SIZES)
SMALL_THREADS = "8 threads, small"
NINTH_THREAD = "8 threads, small; ninth 64 MiB"
EVERY_ROW = (*ALLOCATIONS, *STEPS, SMALL_THREADS)

# (process, setup) -> its rows. A process goes through its setups in this order.
PLAN: dict[str, dict[str, tuple[str, ...]]] = {
    "native": {"native": (*EVERY_ROW, NINTH_THREAD)},
    "ours": {
        "tiered": (*ALLOCATIONS[:3], *STEPS, SMALL_THREADS),
        "low threshold": (*ALLOCATIONS[2:], NINTH_THREAD),
    },
    "managed": {"managed": STEPS, "managed, recorded": EVERY_ROW},
    "pair": {"pair": ALLOCATIONS[2:]},
}


def _set_up(setup: str) -> None:
    if setup == "native":
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


def _measure(setup: str, row: str) -> float:
    size = rows.ALLOCATION_SIZES.get(row.removeprefix("alloc "))
    if size is not None:
        return rows.allocation(size, cached=setup != "pair")
    measures: dict[str, Callable[[], float]] = {
        "training step": rows.training,
        "inference step": rows.inference,
        SMALL_THREADS: lambda: rows.threads(None),
        NINTH_THREAD: lambda: rows.threads(LARGE),
    }
    return measures[row]()


def run(process: str, only: str) -> Iterator[dict[str, str | float]]:
    """Yield the measurements of one process; rows without `only` in their name are left out."""
    for setup, names in PLAN[process].items():
        _set_up(setup)
        for row in names:
            if only not in row:
                continue
            # More managed memory than is free can slow a GPU down for everybody on it.
            size = rows.ALLOCATION_SIZES.get(row.removeprefix("alloc "), 0)
            if size > torch.cuda.mem_get_info()[0] // 2:
                continue
            yield {"setup": setup, "row": row, "seconds": _measure(setup, row)}
            gc.collect()
            if setup != "pair":  # a pluggable allocator has no cache to empty
                torch.cuda.empty_cache()


if __name__ == "__main__":
    for measurement in run(sys.argv[1], sys.argv[2]):
        print(json.dumps(measurement), flush=True)
