"""What the tests of the allocator share: sizes, a byte tensor, and a thread inside a diversion."""

from __future__ import annotations

import contextlib
import gc
import threading
import time
from collections.abc import Callable, Iterator

import pytest
import torch

import egm_alloc

MIB = 1 << 20
GIB = 1 << 30


def block(nbytes: int, device: int = 0) -> torch.Tensor:
    """Return an uninitialised tensor of `nbytes` bytes."""
    return torch.empty(nbytes, dtype=torch.uint8, device=f"cuda:{device}")


def tier(tensor: torch.Tensor) -> str | None:
    """Return the tier that a tensor was placed in."""
    return egm_alloc.info(tensor).tier


def managed_segments(device: int = 0) -> int:
    """Return how many managed segments there are."""
    return egm_alloc.stats(device).extended["managed"].segments


def wait_for(condition: Callable[[], bool]) -> None:
    """Wait until something holds that another thread brings about."""
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


class Background(threading.Thread):
    """A thread whose exception is raised again in `finish`."""

    def __init__(self, work: Callable[[], object]) -> None:
        super().__init__(daemon=True)
        self._work = work
        self.error: BaseException | None = None
        self.result: object = None
        self.start()

    def run(self) -> None:
        """Do the work and keep what came of it."""
        try:
            self.result = self._work()
        except BaseException as error:  # handed to the thread that waits
            self.error = error

    def finish(self, timeout: float = 60) -> object:
        """Wait, and return the result or raise the error."""
        self.join(timeout)
        assert not self.is_alive(), "deadlock"
        if self.error is not None:
            raise self.error
        return self.result


@contextlib.contextmanager
def diversion_underway(sim: object, nbytes: int = 3 * GIB) -> Iterator[Background]:
    """Hold another thread in the midst of a diversion, in cudaMallocManaged, for the block's time.

    On leaving, the diversion goes on; the caller finishes the thread.
    """
    # torch keeps its device lock while it asks for a segment. Other threads' calls would wait for
    # that lock, and so for the end of the diversion, with our gate or without.
    torch._C._accelerator_setAllocatorSettings("release_lock_on_cudamalloc:True")
    try:
        with sim.stall_call("cudaMallocManaged") as stall:  # type: ignore[attr-defined]
            thread = Background(lambda: block(nbytes))
            stall.wait_until_reached()
            yield thread
    finally:
        torch._C._accelerator_setAllocatorSettings("release_lock_on_cudamalloc:False")


@pytest.fixture(autouse=True)
def clean_cache() -> Iterator[None]:
    """Start and end with nothing cached, and end with nothing of ours left."""
    for device in range(torch.cuda.device_count()):
        # Before a test changes the size of HBM: torch keeps what it reads first.
        torch.cuda.get_device_properties(device)
    gc.collect()
    torch.cuda.empty_cache()
    yield
    egm_alloc.disable()
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    for device in range(torch.cuda.device_count()):
        for backing in egm_alloc.stats(device).extended.values():
            assert backing.segments == 0, "a test left an extended segment"
            assert backing.reserved_bytes == 0
            assert backing.allocated_bytes == 0
