"""What is timed: one function per kind of work.

Each prepares its work and returns a function that times one batch of it, in seconds per unit.
Nothing here knows which allocator is in use; ``worker.py`` sets that up.
"""

from __future__ import annotations

import os
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

Batch = Callable[[], float]


def _on_one_processor(timed: Batch) -> Batch:
    """Keep a batch's thread on one processor, the same in every process that is compared."""

    def batch() -> float:
        allowed = os.sched_getaffinity(0)
        os.sched_setaffinity(0, {max(allowed)})
        try:
            return timed()
        finally:
            os.sched_setaffinity(0, allowed)

    return batch


def batch_of(work: Callable[[], object], repeats: int, untimed: int = 0) -> Batch:
    """Time some repeats of a work after untimed ones, the device's part included, per repeat."""

    def batch() -> float:
        for _ in range(untimed):
            work()
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(repeats):
            work()
        torch.cuda.synchronize()
        return (time.perf_counter() - start) / repeats

    return batch


def allocation(size_bytes: int, cached: bool) -> Batch:
    """Time an allocation and free of `size_bytes`; few repeats if nothing caches them."""

    def work() -> None:
        torch.empty(size_bytes, dtype=torch.uint8, device="cuda")

    repeats = 2000 if cached else 3 if size_bytes >= GIB else 20
    return _on_one_processor(batch_of(work, repeats))


def threads(large_bytes: int | None) -> Batch:
    """Time a small allocation with 8 threads at it, perhaps beside a ninth.

    Parameters
    ----------
    large_bytes : int or None
        What the ninth thread allocates over and over; None for no ninth thread.
    """
    per_thread = 1000

    def batch() -> float:
        start_line = threading.Barrier(THREADS + 1)
        done = threading.Event()

        def small() -> None:
            start_line.wait()
            for index in range(per_thread):
                torch.empty(512 << (index % 8), dtype=torch.uint8, device="cuda")

        def large() -> None:
            while not done.is_set():
                torch.empty(large_bytes or 0, dtype=torch.uint8, device="cuda")

        workers = [threading.Thread(target=small) for _ in range(THREADS)]
        ninth = [threading.Thread(target=large)] if large_bytes is not None else []
        for thread in (*workers, *ninth):
            thread.start()
        start_line.wait()
        start = time.perf_counter()
        for worker in workers:
            worker.join()
        seconds = (time.perf_counter() - start) / (THREADS * per_thread)
        done.set()
        for thread in ninth:
            thread.join()
        return seconds

    return batch


def _transformer() -> nn.Module:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(
        _WIDTH, nhead=16, dim_feedforward=4 * _WIDTH, dropout=0.0, batch_first=True, norm_first=True
    )
    return nn.TransformerEncoder(layer, _LAYERS, enable_nested_tensor=False).cuda()


def training(cached: bool) -> Batch:
    """Time a training step: batch 8, 512 tokens, width 1024, 8 layers, bfloat16 autocast.

    As with `allocation`, few repeats if nothing caches its memory.
    """
    model = _transformer()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    data = torch.randn(8, 512, _WIDTH, device="cuda")

    def forward() -> torch.Tensor:
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss: torch.Tensor = model(data).float().square().mean()
        return loss

    def work() -> None:
        optimizer.zero_grad()
        forward().backward()
        optimizer.step()

    forward()  # what is loaded for it is loaded on any processor, beside the other processes
    # The thread of the backward pass is born in the first batch and stays on that processor. The
    # untimed step finds the processor's caches, and the GPU, as another process left them.
    return _on_one_processor(batch_of(work, 2, untimed=1) if cached else batch_of(work, 1))


def inference(cached: bool) -> Batch:
    """Time an inference step: batch 1, 128 tokens, width 1024, 8 layers, bfloat16.

    As with `allocation`, few repeats if nothing caches its memory.
    """
    model = _transformer().to(torch.bfloat16)  # not eval(): that takes another, fused path
    data = torch.randn(1, 128, _WIDTH, device="cuda", dtype=torch.bfloat16)

    def work() -> None:
        with torch.no_grad():
            model(data)

    work()  # as in `training`
    return _on_one_processor(batch_of(work, 6, untimed=2) if cached else batch_of(work, 1))
