"""What is timed: one function per kind of work, each returning seconds per unit of work.

Nothing here knows which allocator is in use; ``worker.py`` sets that up.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable

import torch
from torch import nn

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30

ALLOCATION_SIZES = {
    "4 KiB": 4 * KIB,
    "1 MiB": MIB,
    "64 MiB": 64 * MIB,
    "1 GiB": GIB,
    "3 GiB": 3 * GIB,
}
THREADS = 8
_WIDTH, _LAYERS = 1024, 8


def median_of_batches(work: Callable[[], object], repeats: int, batches: int) -> float:
    """Return the median over `batches` of the mean seconds of one `work()` among `repeats`."""
    seconds = []
    for _ in range(batches):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(repeats):
            work()
        torch.cuda.synchronize()
        seconds.append((time.perf_counter() - start) / repeats)
    return statistics.median(seconds)


def allocation(size_bytes: int, cached: bool) -> float:
    """Return seconds for one allocation and free of `size_bytes`; few repeats if not cached."""

    def work() -> None:
        torch.empty(size_bytes, dtype=torch.uint8, device="cuda")

    for _ in range(3):
        work()
    if cached:
        return median_of_batches(work, repeats=2000, batches=15)
    return median_of_batches(work, repeats=3 if size_bytes >= GIB else 20, batches=5)


def threads(large_bytes: int | None) -> float:
    """Return seconds per small allocation with 8 threads at it, perhaps beside a ninth.

    Parameters
    ----------
    large_bytes : int or None
        What the ninth thread allocates over and over; None for no ninth thread.
    """
    rounds, per_round = 11, 2000
    seconds = []
    for _ in range(rounds):
        start_line = threading.Barrier(THREADS + 1)
        done = threading.Event()

        def small(line: threading.Barrier = start_line) -> None:
            line.wait()
            for index in range(per_round):
                torch.empty(512 << (index % 8), dtype=torch.uint8, device="cuda")

        def large(finished: threading.Event = done) -> None:
            while not finished.is_set():
                torch.empty(large_bytes or 0, dtype=torch.uint8, device="cuda")

        workers = [threading.Thread(target=small) for _ in range(THREADS)]
        ninth = threading.Thread(target=large)
        for worker in workers:
            worker.start()
        if large_bytes is not None:
            ninth.start()
        start_line.wait()
        start = time.perf_counter()
        for worker in workers:
            worker.join()
        seconds.append((time.perf_counter() - start) / (THREADS * per_round))
        done.set()
        if large_bytes is not None:
            ninth.join()
    return statistics.median(seconds)


def _transformer() -> nn.Module:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(
        _WIDTH, nhead=16, dim_feedforward=4 * _WIDTH, dropout=0.0, batch_first=True, norm_first=True
    )
    return nn.TransformerEncoder(layer, _LAYERS, enable_nested_tensor=False).cuda()


def training() -> float:
    """Return seconds of one training step: batch 8, 512 tokens, width 1024, 8 layers, bfloat16."""
    model = _transformer()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    data = torch.randn(8, 512, _WIDTH, device="cuda")

    def work() -> None:
        optimizer.zero_grad()
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = model(data).float().square().mean()
        loss.backward()
        optimizer.step()

    for _ in range(10):
        work()
    return median_of_batches(work, repeats=5, batches=11)


def inference() -> float:
    """Return seconds of one inference step: batch 1, 128 tokens, width 1024, 8 layers, bfloat16."""
    model = _transformer().to(torch.bfloat16)  # not eval(): that takes another, fused path
    data = torch.randn(1, 128, _WIDTH, device="cuda", dtype=torch.bfloat16)

    def work() -> None:
        with torch.no_grad():
            model(data)

    for _ in range(20):
        work()
    return median_of_batches(work, repeats=20, batches=15)
