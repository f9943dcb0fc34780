"""Control of the simulated machine from inside the process that runs on it."""

from __future__ import annotations

import ctypes
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from tests.simulator.calls import Call, CallLog, Fault, Kind, Stall
from tests.simulator.library import declare

GIB = 1 << 30
_ALL_STREAMS = (0, 1)


class HasHandle(Protocol):
    """Anything with a CUDA stream handle, such as ``torch.cuda.Stream``."""

    @property
    def cuda_stream(self) -> int:
        """The handle."""


def _handle(stream: int | HasHandle) -> int:
    return stream if isinstance(stream, int) else stream.cuda_stream


class Simulator:
    """The simulated machine of this process; see README.md for what it does.

    Everything but :attr:`active` raises RuntimeError where no simulator is loaded.
    """

    def __init__(self) -> None:
        library = ctypes.CDLL(None)
        self._loaded: ctypes.CDLL | None = library if hasattr(library, "egm_sim_devices") else None
        if self._loaded is not None:
            declare(self._loaded)
            self._hbm_at_start = [self.hbm(i)["capacity"] for i in range(self.devices)]
            self._host_numa_at_start = [self.host_numa(i)["total"] for i in range(self.host_nodes)]
            self._peer_access = os.environ.get("EGM_SIM_PEER_ACCESS", "1") != "0"

    @property
    def _library(self) -> ctypes.CDLL:
        if self._loaded is None:
            raise RuntimeError("not on the simulator: run under `python -m tests.simulator -- ...`")
        return self._loaded

    @property
    def active(self) -> bool:
        """Whether this process runs on the simulated machine."""
        return self._loaded is not None

    @property
    def machine(self) -> str:
        """The name of the preset."""
        return str(self._library.egm_sim_machine().decode())

    @property
    def devices(self) -> int:
        """The number of devices."""
        return int(self._library.egm_sim_devices())

    @property
    def host_bytes(self) -> int:
        """Memory of the host, in bytes."""
        return int(self._library.egm_sim_host_bytes())

    @property
    def egm_bytes(self) -> int:
        """The part of the host's memory that is carved out for the GPU, in bytes."""
        return int(self._library.egm_sim_egm_bytes())

    @property
    def host_nodes(self) -> int:
        """The number of NUMA nodes of the host's memory, counted from 0."""
        return int(self._library.egm_sim_host_nodes())

    @property
    def host_page_bytes(self) -> int:
        """Page size of the host's kernel (64 KiB on Grace); this process keeps its real one."""
        return int(self._library.egm_sim_host_page_kib()) << 10

    def reset(self) -> None:
        """Back to the start, memory aside: no faults, no log, nothing held, sizes as configured."""
        self._library.egm_sim_disarm_all_faults()
        self._library.egm_sim_stop_log()
        self._library.egm_sim_count_calls(0)
        self.release()
        self._library.egm_sim_forget_unmappings()
        self.set_peer_access(self._peer_access)
        self.set_host_root(os.environ.get("EGM_SIM_HOST_ROOT", ""))
        for device, capacity in enumerate(self._hbm_at_start):
            self._library.egm_sim_set_hbm(device, capacity)
        for node, total in enumerate(self._host_numa_at_start):
            self._library.egm_sim_set_host_numa(node, total)

    @contextmanager
    def call_log(self, *, everything: bool = False, limit: int = 1_000_000) -> Iterator[CallLog]:
        """Record calls for the length of a ``with`` block.

        Parameters
        ----------
        everything : bool
            Also those that are left out by default: kernel launches and the questions that torch
            asks all the time (README.md has the list).
        limit : int
            Calls kept; reading the log after more raises RuntimeError.
        """
        self._library.egm_sim_start_log(int(everything), limit)
        log = CallLog(self._take_log)
        try:
            yield log
        finally:
            self._library.egm_sim_stop_log()
            len(log)  # takes what is left

    def _take_log(self) -> list[Call]:
        *lines, dropped = self._text("egm_sim_take_log").split("\n")
        if int(dropped) > 0:
            raise RuntimeError(f"the call log overflowed by {dropped} calls: raise its limit")
        return [Call(**json.loads(line)) for line in lines]

    @contextmanager
    def fail_call(
        self,
        name: str,
        error: str = "cudaErrorMemoryAllocation",
        nth: int = 1,
        times: int = 1,
    ) -> Iterator[Fault]:
        """Let calls of a function fail without doing anything.

        Parameters
        ----------
        name : str
            The function, or "*" for every one that the call log shows by default.
        error : str
            Name of the error, in the runtime's or the driver's spelling.
        nth : int
            The first call that fails, counted from 1.
        times : int
            How many calls fail from there on; -1 for all.

        Examples
        --------
        >>> with sim.fail_call("cudaMallocManaged", nth=2) as fault:
        ...     scenario()
        >>> assert fault.fired == 1
        """
        number = self._library.egm_sim_fail_call(name.encode(), error.encode(), nth, times)
        if number < 0:
            raise ValueError(f"{error} is not the name of a CUDA error")
        fault = Fault(self._library, number)
        try:
            yield fault
        finally:
            fault.disarm()

    @contextmanager
    def stall_call(self, name: str, seconds: float | None = None) -> Iterator[Stall]:
        """Make calls of a function wait before they do anything.

        Parameters
        ----------
        name : str
            The function.
        seconds : float or None
            How long each waits; None: until the ``with`` block ends, which ends every wait.

        Examples
        --------
        >>> with sim.stall_call("cudaMallocManaged") as stall:
        ...     thread.start()
        ...     stall.wait_until_reached()
        ...     ...  # the thread is in the midst of the call
        """
        number = self._library.egm_sim_stall_call(
            name.encode(), -1.0 if seconds is None else seconds
        )
        try:
            yield Stall(self._library, number)
        finally:
            self._library.egm_sim_end_stall(number)

    def count_calls(self, scenario: Callable[[], object]) -> int:
        """How many calls a scenario makes, so that each can be made to fail in turn.

        Examples
        --------
        >>> for nth in range(1, sim.count_calls(scenario) + 1):
        ...     with sim.fail_call("*", nth=nth):
        ...         scenario()
        """
        self._library.egm_sim_count_calls(1)
        try:
            scenario()
            return int(self._library.egm_sim_calls_counted())
        finally:
            self._library.egm_sim_count_calls(0)

    def hold(self, stream: int | HasHandle | None = None) -> None:
        """Work submitted to a stream (None: to any) from now on is reported as pending.

        Until :meth:`release`, or until somebody waits for it.
        """
        self._hold(stream, on=True)

    def release(self, stream: int | HasHandle | None = None) -> None:
        """Everything that was held on a stream (None: on all) is done."""
        self._hold(stream, on=False)

    @contextmanager
    def holding(self, stream: int | HasHandle | None = None) -> Iterator[None]:
        """Hold a stream for the length of a ``with`` block."""
        self.hold(stream)
        try:
            yield
        finally:
            self.release(stream)

    def _hold(self, stream: int | HasHandle | None, on: bool) -> None:
        handle, everywhere = _ALL_STREAMS if stream is None else (_handle(stream), 0)
        if self._library.egm_sim_hold(handle, everywhere, int(on)) != 0:
            raise ValueError(f"{stream} is not a stream")

    def set_hbm_gib(self, gib: float, device: int | None = None) -> None:
        """Give a device (None: all) another size of HBM; managed pages that no longer fit move."""
        for each in range(self.devices) if device is None else [device]:
            if self._library.egm_sim_set_hbm(each, int(gib * GIB)) != 0:
                raise ValueError(f"there is no device {each}")

    def set_host_numa_gib(self, gib: float, node: int = 0) -> None:
        """Give a node of the host another size, as :meth:`host_numa` counts it."""
        if self._library.egm_sim_set_host_numa(node, int(gib * GIB)) != 0:
            raise ValueError(f"the host has no node {node}")

    def set_host_root(self, root: str | Path) -> None:
        """Take the host's memory, as the kernel shows it, from another folder: see ``host.py``."""
        self._library.egm_sim_set_host_root(os.fsencode(root))

    def set_peer_access(self, possible: bool) -> None:
        """Whether devices can reach each other's memory."""
        self._library.egm_sim_set_peer_access(int(possible))

    def hbm(self, device: int = 0) -> dict[str, int]:
        """Bytes of HBM: capacity, taken (by what stays), resident and evicted managed pages."""
        numbers = (ctypes.c_size_t * 4)()
        if self._library.egm_sim_hbm(device, numbers) != 0:
            raise ValueError(f"there is no device {device}")
        return dict(zip(("capacity", "taken", "resident", "evicted"), numbers, strict=True))

    def host_numa(self, node: int = 0) -> dict[str, int]:
        """Bytes that cuMemCreate has taken of a node of the host, and could take in total."""
        numbers = (ctypes.c_size_t * 2)()
        if self._library.egm_sim_host_numa(node, numbers) != 0:
            raise ValueError(f"the host has no node {node}")
        return dict(zip(("total", "taken"), numbers, strict=True))

    def reserved_bytes(self) -> int:
        """Bytes of addresses that cuMemAddressReserve gave out and nobody freed."""
        return int(self._library.egm_sim_reserved_bytes())

    def unmapped_while_busy(self) -> int:
        """How often cuMemUnmap or cudaHostUnregister took memory away while a stream was pending.

        Any stream of any device counts, since the last :meth:`reset`; hold one to make it pending.
        """
        return int(self._library.egm_sim_unmapped_while_busy())

    def resident_bytes(self, address: int, size: int, where: int | str = 0) -> int:
        """Bytes of a range of managed memory that are in one place.

        Parameters
        ----------
        address, size : int
            The range.
        where : int or str
            A device, "host", or "unpopulated". Pages move in chunks of 2 MiB.

        Raises
        ------
        ValueError
            If the range is not managed memory.
        """
        place = {"host": -1, "unpopulated": -2}[where] if isinstance(where, str) else where
        found = int(self._library.egm_sim_resident(address, size, place))
        if found < 0:
            raise ValueError(f"{address:#x} is not managed memory")
        return found

    def touch(self, address: int, size: int, by: int | str = 0) -> None:
        """Do to managed memory what a kernel of a device (or the CPU, "host") would by using it."""
        self._library.egm_sim_touch(address, size, -1 if by == "host" else by)

    def live_allocations(self, device: int = 0) -> dict[str, Kind]:
        """What is allocated on a device, by kind.

        Kinds are "device" (cudaMalloc), "managed", "async" (cudaMallocAsync), "vmm" (HBM mapped by
        cuMemMap), "vmm-host" (the host's memory mapped by it), "host" (cudaHostAlloc), "registered"
        (cudaHostRegister) and "imported" (IPC); those with nothing alive are missing. Memory of the
        host counts for the device that was current.
        """
        live = {}
        for line in self._text("egm_sim_live").splitlines():
            kind, owner, count, size = line.split()
            if int(owner) == device:
                live[kind] = Kind(int(count), int(size))
        return live

    def _text(self, function: str) -> str:
        pointer = getattr(self._library, function)()
        try:
            return (ctypes.cast(pointer, ctypes.c_char_p).value or b"").decode()
        finally:
            self._library.egm_sim_free_text(pointer)
