"""A long random run that looks for growth: of process memory, of reserved bytes, of pools' uses.

The run has windows. At the end of each everything is freed and emptied, so nothing may stay
reserved: a pool whose uses do not balance never becomes freeable and would keep its segments. The
second half of the windows repeats the first half, so there nothing may be greater than before.

    python -m tests.simulator --hbm-gib 400 -- python benchmarks/soak.py
"""

from __future__ import annotations

import argparse
import gc
import math
import os
import random
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

import egm_alloc

MIB, GIB = 1 << 20, 1 << 30
SMALLEST, LARGEST = 512, 256 * MIB
HUGE = (3 * GIB, 100 * GIB)
HUGE_SHARE = 0.01  # arbitrary: large enough for thousands of diversions
MOST_LIVE_SMALL, MOST_LIVE_HUGE = 64, 2
WINDOWS = 10
# Arbitrary, and far below one leaked record per operation.
MEMORY_SLACK_BYTES = 8 * MIB
# Which of several equal blocks torch takes depends on their addresses, and with it how the rest
# fits: some MiB more or less of 300 GiB, in either direction.
RESERVED_SLACK_BYTES = 64 * MIB


@dataclass(frozen=True)
class Window:
    """What one window left behind.

    Parameters
    ----------
    resident_bytes : int
        Of the process, after everything was freed.
    peak_reserved_bytes : int
        The most that torch held in it, both tiers.
    left_bytes : int
        What torch and the extended tier held after everything was freed and emptied.
    segments : int
        Extended segments then.
    """

    resident_bytes: int
    peak_reserved_bytes: int
    left_bytes: int
    segments: int


def resident_bytes() -> int:
    """Return the resident memory of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def random_size(chance: random.Random) -> int:
    """Return a size: evenly spread over powers of two, and now and then a huge one."""
    if chance.random() < HUGE_SHARE:
        return chance.choice(HUGE)
    return int(math.exp(chance.uniform(math.log(SMALLEST), math.log(LARGEST))))


def run_window(operations: int, seed: int, streams: list[torch.cuda.Stream]) -> Window:
    """Allocate and free at random, `operations` in all, then free and empty everything."""
    chance = random.Random(seed)
    small: list[torch.Tensor] = []
    huge: list[torch.Tensor] = []
    torch.cuda.reset_peak_memory_stats()
    done = 0
    while done < operations:
        size = random_size(chance)
        live, most = (huge, MOST_LIVE_HUGE) if size in HUGE else (small, MOST_LIVE_SMALL)
        if len(live) >= most:
            live.pop(chance.randrange(len(live)))
            done += 1
        stream, other = chance.sample(streams, 2)
        with torch.cuda.stream(stream):
            tensor = torch.empty(size, dtype=torch.uint8, device="cuda")
        if chance.random() < 0.05:
            tensor.record_stream(other)
        live.append(tensor)
        done += 1
    peak = torch.cuda.max_memory_reserved()
    del tensor
    small.clear()
    huge.clear()
    torch.cuda.synchronize()
    gc.collect()
    torch.cuda.empty_cache()
    extended = egm_alloc.stats()
    return Window(
        resident_bytes=resident_bytes(),
        peak_reserved_bytes=peak,
        left_bytes=torch.cuda.memory_reserved() + extended.extended_tier.reserved_bytes,
        segments=sum(backing.segments for backing in extended.extended.values()),
    )


def problems(windows: list[Window]) -> list[str]:
    """Return what grew, in words; nothing if all is well."""
    found = []
    half = len(windows) // 2
    for number, window in enumerate(windows, 1):
        if window.left_bytes or window.segments:
            found.append(
                f"window {number} left {window.left_bytes} bytes in {window.segments} segments"
            )
    for first, again in zip(windows[:half], windows[half:], strict=True):
        if again.peak_reserved_bytes > first.peak_reserved_bytes + RESERVED_SLACK_BYTES:
            found.append(
                f"the same operations reserved {again.peak_reserved_bytes} bytes, "
                f"and {first.peak_reserved_bytes} before"
            )
    grown = windows[-1].resident_bytes - windows[half - 1].resident_bytes
    if grown > MEMORY_SLACK_BYTES:
        found.append(f"the process grew by {grown} bytes after warm-up")
    return found


def main() -> int:
    """Run, print the figures of each window; return 0 if nothing grew."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--operations", type=int, default=1_000_000, help="in all")
    parser.add_argument("--mode", choices=["tiered", "managed"], default="tiered")
    arguments = parser.parse_args()
    egm_alloc.enable(mode=arguments.mode)
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    windows: list[Window] = []
    start = time.perf_counter()
    print(f"{'window':>6}  {'operations':>10}  {'peak GiB':>9}  {'left':>5}  {'process MiB':>11}")
    for number in range(1, WINDOWS + 1):
        seed = (number - 1) % (WINDOWS // 2)
        window = run_window(arguments.operations // WINDOWS, seed, streams)
        windows.append(window)
        print(
            f"{number:>6}  {arguments.operations // WINDOWS * number:>10}  "
            f"{window.peak_reserved_bytes / GIB:>9.3f}  {window.left_bytes:>5}  "
            f"{window.resident_bytes / MIB:>11.1f}",
            flush=True,
        )
    print(f"{time.perf_counter() - start:.0f} s, mode {arguments.mode}")
    print(egm_alloc.memory_summary())
    found = problems(windows)
    print("\n".join(found) if found else "Nothing grew.")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
