"""Measuring one large tensor in each kind of memory, by the public interface alone."""

from __future__ import annotations

import dataclasses
import math
import re
import statistics
import time
from collections.abc import Callable, Sequence

import torch

from egm_alloc.control import get_config
from egm_alloc.diagnosis import diagnose_device
from egm_alloc.host import diagnose_host
from egm_alloc.placement import place

KINDS = ("device", "managed", "pinned", "numa", "split")
_GIB = 1 << 30
_LEAST_SPLIT_BYTES = 10 << 20  # see kLeastSplit in csrc/core/placement.h
_BATCHES, _REPEATS = 3, 5
_ALLOCATIONS = 1000


@dataclasses.dataclass(frozen=True)
class Row:
    """The figures of one kind of memory; None where it could not be measured.

    Parameters
    ----------
    kind : str
        One of ``KINDS``.
    allocation_ms_per_gib, first_write_ms_per_gib : float or None
        The time for the first allocation, and for the GPU's first write to it.
    read_gb_per_s, write_gb_per_s : float or None
        The GPU's bandwidth once the memory has been used, in 10**9 bytes per second.
    cached_us : float or None
        The time to allocate and free it again, from torch's cache.
    missing : str or None
        Why there are no figures.
    """

    kind: str
    allocation_ms_per_gib: float | None = None
    first_write_ms_per_gib: float | None = None
    read_gb_per_s: float | None = None
    write_gb_per_s: float | None = None
    cached_us: float | None = None
    missing: str | None = None


@dataclasses.dataclass(frozen=True)
class Report:
    """The figures of a device.

    Parameters
    ----------
    machine : str
        The device's name.
    simulated : bool
        Whether it is the simulated one, so that the figures mean nothing.
    device, size_bytes : int
        Its index, and the size of the tensor.
    device_fraction : float
        The part of a split tensor that is in HBM.
    rows : tuple of Row
        One for each kind.
    """

    machine: str
    simulated: bool
    device: int
    size_bytes: int
    device_fraction: float
    rows: tuple[Row, ...]


def check_room(size_bytes: int, kinds: Sequence[str], device: int) -> None:
    """Refuse a size that would take more than half of what is free.

    Parameters
    ----------
    size_bytes : int
        The size of the tensor.
    kinds : sequence of str
        The kinds that it is to be made in.
    device : int
        The device.

    Raises
    ------
    ValueError
        If half of the free HBM, of the available host memory, or of a carve-out is less.
    """
    in_hbm = get_config().device_fraction
    host = diagnose_host()
    hbm = (torch.cuda.mem_get_info(device)[0], "free HBM")
    ordinary = (host.available_bytes or 0, "available host memory")
    mapped = ordinary if host.egm_bytes is None else (host.egm_bytes, "the EGM carve-out")
    shares = {
        "device": [(1.0, hbm)],
        "managed": [(1.0, hbm)],
        "pinned": [(1.0, ordinary)],
        "numa": [(1.0, mapped)],
        "split": [(in_hbm, hbm), (1 - in_hbm, mapped)],
    }
    for kind in kinds:
        for share, (free, name) in shares[kind]:
            if size_bytes * share > free / 2:
                most = math.floor(free / 2 / share / _GIB * 1000) / 1000
                raise ValueError(
                    f"size_gib is {size_bytes / _GIB:g}; allowed: at most {most:.3f} with the kind "
                    f"{kind!r} (half of the {free / _GIB:.2f} GiB of {name})"
                )


def measure(
    size_bytes: int,
    kinds: Sequence[str],
    device: int,
    progress: Callable[[str], None] = lambda _: None,
) -> Report:
    """Measure a tensor in each kind of memory.

    Parameters
    ----------
    size_bytes : int
        Its size, for which `check_room` found room.
    kinds : sequence of str
        Which kinds, of ``KINDS``.
    device : int
        The device. egm_alloc is on.
    progress : callable
        Told what is being done.

    Returns
    -------
    Report
    """
    about = diagnose_device(device)
    rows = []
    with torch.cuda.device(device):
        _warm_up()
        for kind in kinds:
            progress(kind)
            if kind == "split" and size_bytes < _LEAST_SPLIT_BYTES:
                rows.append(Row(kind, missing="tensors below 10 MiB are not split"))
                continue
            try:
                rows.append(_measure_kind(kind, size_bytes))
            except RuntimeError as error:  # OutOfMemoryError is one
                rows.append(Row(kind, missing=_reason(error)))
            finally:
                torch.cuda.empty_cache()
    return Report(
        machine=about.name,
        simulated=about.simulated,
        device=device,
        size_bytes=size_bytes,
        device_fraction=get_config().device_fraction,
        rows=tuple(rows),
    )


def _warm_up() -> None:
    """Load the kernels, so that nobody's first use of them is timed."""
    small = torch.empty(1 << 20, dtype=torch.float32, device="cuda")
    small.zero_()
    small.sum()
    del small
    torch.cuda.empty_cache()


def seconds(work: Callable[[], object], repeats: int = 1) -> float:
    """Return the wall time of one `work`, the device's part included."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        work()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / repeats


def _steady_seconds(work: Callable[[], object]) -> float:
    work()
    return statistics.median(seconds(work, _REPEATS) for _ in range(_BATCHES))


def _measure_kind(kind: str, size_bytes: int) -> Row:
    def allocate() -> torch.Tensor:
        with place(kind, min_bytes=1):
            return torch.empty(size_bytes // 4, dtype=torch.float32, device="cuda")

    def allocate_and_free() -> None:
        for _ in range(_ALLOCATIONS):
            torch.empty(size_bytes // 4, dtype=torch.float32, device="cuda")

    made: list[torch.Tensor] = []
    allocation = seconds(lambda: made.append(allocate()))
    first_write = seconds(made[0].zero_)
    write = _steady_seconds(made[0].zero_)
    read = _steady_seconds(made[0].sum)
    made.clear()
    with place(kind, min_bytes=1):
        cached = seconds(allocate_and_free) / _ALLOCATIONS
    gib = size_bytes / _GIB
    return Row(
        kind=kind,
        allocation_ms_per_gib=allocation * 1e3 / gib,
        first_write_ms_per_gib=first_write * 1e3 / gib,
        read_gb_per_s=size_bytes / read / 1e9,
        write_gb_per_s=size_bytes / write / 1e9,
        cached_us=cached * 1e6,
    )


def _reason(error: RuntimeError) -> str:
    """Return why memory could not be had, without what torch holds."""
    text = str(error).partition("\n")[0]
    ours = re.search(r"egm_alloc: on device [^;]*; (.*?)\)?$", str(error), re.DOTALL)
    return ours[1] if ours else text
