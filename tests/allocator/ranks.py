"""Processes beside each other on one simulated host, as the ranks of a training job are."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

import egm_alloc
from egm_alloc import _C
from tests.allocator.conftest import MIB, wait_for
from tests.simulator import sim

__all__ = ["MIB", "Rank", "Work"]

# Forked from a process that has imported torch and has not brought CUDA up.
_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload([__name__])


class Work:
    """What a rank is told to do; every method is called through `Rank.do`."""

    def __init__(self) -> None:
        self.held: list[torch.Tensor] = []
        self.past_torch = ctypes.c_void_p()

    def take(
        self, mib: int, kind: str = "managed", device: int = 0, fraction: float | None = None
    ) -> str:
        """Hold a tensor; the message of the error if it cannot be had, else nothing."""
        try:
            with egm_alloc.place(kind, device_fraction=fraction):
                tensor = torch.empty(mib * MIB, dtype=torch.uint8, device=f"cuda:{device}")
        except torch.cuda.OutOfMemoryError as error:
            return str(error)
        self.held.append(tensor)
        return ""

    def take_waiting(self, mib: int, kind: str) -> str:
        """Take while another is in the way; tell it to go on (`others`) once this one waits."""
        result: list[str] = []
        with sim.call_log(everything=True) as log:
            thread = threading.Thread(target=lambda: result.append(self.take(mib, kind)))
            thread.start()
            # Each time that it looks again it asks how many devices there are.
            while thread.is_alive() and len(log.of("cudaGetDeviceCount")) < 20:
                time.sleep(0.01)
        self.tell("waits" if thread.is_alive() else "has not waited")
        thread.join()
        return result[0]

    def take_stalled(self, mib: int, kind: str, call: str) -> str:
        """Take, and stand still in a call until told to go on; then give it back."""
        result: list[str] = []
        with sim.stall_call(call) as stall:
            thread = threading.Thread(target=lambda: result.append(self.take(mib, kind)))
            thread.start()
            stall.wait_until_reached()
            self.tell("stands still")
            self.listen()
        thread.join()
        return result[0]

    def take_together(self, mib: int, times: int) -> list[str]:
        """Take again and again, each time at the moment that is told."""
        results = []
        for _ in range(times):
            self.tell("ready")
            moment = self.listen()
            while time.monotonic() < moment:
                pass
            results.append(self.take(mib))
            self.tell("done")
            self.listen()
            self.free()
        return results

    def stock(self, mib: int) -> None:
        """Have host memory brought up ahead, for tensors taken from now on."""
        self.ahead = _C.HostStock(0, mib * MIB, 2 * MIB)
        wait_for(lambda: self.ahead.held_bytes == mib * MIB)
        self.ahead.__enter__()

    def end_stock(self) -> None:
        """Give back what of it was not taken."""
        self.ahead.__exit__(None, None, None)

    def free(self) -> None:
        """Give everything back to the host."""
        self.held.clear()
        torch.cuda.empty_cache()

    def populate(self) -> None:
        """Touch every page of what is held from the CPU."""
        for tensor in self.held:
            ctypes.memset(tensor.data_ptr(), 1, tensor.numel())

    def use(self) -> None:
        """Do to what is held what a kernel on the first device would do to it."""
        for tensor in self.held:
            sim.touch(tensor.data_ptr(), tensor.nbytes, by=0)

    def plain(self, mib: int) -> None:
        """Hold HBM of torch's own."""
        self.held.append(torch.empty(mib * MIB, dtype=torch.uint8, device="cuda"))

    def library(self, mib: int) -> None:
        """Take HBM past torch."""
        torch.cuda.init()
        size = ctypes.c_size_t(mib * MIB)
        assert ctypes.CDLL(None).cudaMalloc(ctypes.byref(self.past_torch), size) == 0

    def library_gives_back(self) -> None:
        """Give that back."""
        assert ctypes.CDLL(None).cudaFree(self.past_torch) == 0

    def fork(self) -> int:
        """Leave a child that only lives, and return its id."""
        child = os.fork()
        if child == 0:
            while True:
                signal.pause()
        return child

    def configure(self, **fields: Any) -> None:
        """Change the configuration."""
        egm_alloc.enable(**fields)

    def bookings(self) -> dict[str, Any]:
        """What is booked of host memory."""
        return dict(_C.host_bookings())

    tell: Callable[[str], None]
    listen: Callable[[], Any]


def _serve(connection: Connection, root: str) -> None:
    sim.set_host_root(root)
    # All memory is of the host, and none of it must stay free.
    egm_alloc.enable(
        threshold_gib=64, preferred_location="host", host_reserve_gib=0, mode="tiered", spill=False
    )
    work = Work()
    work.tell = connection.send
    work.listen = connection.recv
    while True:
        name, arguments, options = connection.recv()
        try:
            connection.send(getattr(work, name)(*arguments, **options))
        except Exception as error:  # for the test to see
            connection.send(error)


class Rank:
    """A process on a host.

    Parameters
    ----------
    root : Path
        The host's files: see ``tests/simulator/host.py``.
    """

    def __init__(self, root: Path) -> None:
        self._connection, theirs = _processes.Pipe()
        self._process = _processes.Process(target=_serve, args=(theirs, str(root)), daemon=True)
        self._process.start()
        theirs.close()

    def do(self, name: str, *arguments: object, **options: object) -> Any:
        """Let it do something, and return the result."""
        self.begin(name, *arguments, **options)
        return self.answer()

    def begin(self, name: str, *arguments: object, **options: object) -> None:
        """Let it do something."""
        self._connection.send((name, arguments, options))

    def answer(self, timeout: float = 90) -> Any:
        """Wait for what it says."""
        assert self._connection.poll(timeout), "the rank says nothing"
        answer = self._connection.recv()
        if isinstance(answer, Exception):
            raise answer
        return answer

    def tell(self, what: object = None) -> None:
        """Let it go on."""
        self._connection.send(what)

    def kill(self) -> None:
        """End it without a chance to clean up."""
        self._process.kill()
        self._process.join()
