"""What is allocated where: counters of both tiers, and a table of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from egm_alloc import _C
from egm_alloc.config import Device, check_device_index
from egm_alloc.control import get_config, is_enabled
from egm_alloc.placement import tag_name


@dataclasses.dataclass(frozen=True)
class TierStats:
    """Bytes of one tier on one device.

    Parameters
    ----------
    allocated_bytes : int
        Bytes of live blocks.
    reserved_bytes : int
        Bytes of the segments that hold them, cached blocks included.
    """

    allocated_bytes: int
    reserved_bytes: int


@dataclasses.dataclass(frozen=True)
class BackingStats:
    """Counters of one backing of the extended tier on one device.

    Parameters
    ----------
    allocated_bytes, reserved_bytes : int
        As in `TierStats`; the C pair's memory counts in both.
    reserved_peak_bytes : int
        The most that ``reserved_bytes`` was since the last `reset_peak_stats`.
    segments : int
        Live segments.
    segment_allocs, segment_frees : int
        Segments ever acquired and released.
    allocations, frees : int
        Requests ever served and given back, torch's and the C pair's.
    prefetches, prefetch_failures : int
        Prefetches ever asked for, and those of them that failed.
    advice_failures : int
        Pieces of advice that the driver refused; the memory was used without them.
    limit_refusals : int
        Requests refused because of ``limit_gib``.
    reserve_refusals : int
        Requests refused because of ``host_reserve_gib``.
    spills : int
        Requests served from here because HBM could not hold them.
    """

    allocated_bytes: int
    reserved_bytes: int
    reserved_peak_bytes: int
    segments: int
    segment_allocs: int
    segment_frees: int
    allocations: int
    frees: int
    prefetches: int
    prefetch_failures: int
    advice_failures: int
    limit_refusals: int
    reserve_refusals: int
    spills: int


@dataclasses.dataclass(frozen=True)
class Stats:
    """Counters of one device.

    Parameters
    ----------
    device : int
        The device's index.
    device_tier : TierStats
        HBM held by torch's caching allocator, but for what `place` put there.
    extended : dict of str to BackingStats
        The extended tier, by backing; the backing ``device`` is HBM by ``place("device")``, and
        counts against ``limit_gib`` as the others do.
    tags : dict of str to TierStats
        What blocks of `place` with a tag placed, by tag; of both tiers. What a block leaves where
        torch puts it, such as ``"split"`` tensors below 10 MiB, is not in it.
    host_available_bytes : int
        Host memory that can be taken now, the reserve included; 0 while CUDA is not initialised.
    """

    device: int
    device_tier: TierStats
    extended: dict[str, BackingStats]
    tags: dict[str, TierStats]
    host_available_bytes: int

    @property
    def extended_tier(self) -> TierStats:
        """The extended tier over all backings."""
        backings = self.extended.values()
        return TierStats(
            allocated_bytes=sum(backing.allocated_bytes for backing in backings),
            reserved_bytes=sum(backing.reserved_bytes for backing in backings),
        )


def _device_index(device: Device | None) -> int:
    if device is None or str(device) == "cuda":  # as in torch.cuda
        return torch.cuda.current_device() if torch.cuda.is_initialized() else 0
    allowed = "a CUDA device (1, 'cuda:1' or torch.device('cuda', 1)), or None for the current one"
    index = check_device_index("device", device, allowed)
    if torch.cuda.is_initialized() and index >= torch.cuda.device_count():
        raise ValueError(
            f"device is {device!r}; allowed: an index below {torch.cuda.device_count()}, "
            "the number of CUDA devices here"
        )
    return index


def stats(device: Device | None = None) -> Stats:
    """Return the counters of a device.

    Parameters
    ----------
    device : int, str or torch.device, optional
        The device; None or ``"cuda"`` for the current one.

    Returns
    -------
    Stats
        All zeros while CUDA is not initialised.

    Raises
    ------
    TypeError, ValueError
        If `device` is not a CUDA device or, once CUDA is up, not one of this machine.

    Examples
    --------
    >>> egm_alloc.stats().extended["managed"].reserved_bytes
    3221225472
    """
    index = _device_index(device)
    raw = _C.stats(index)
    return Stats(
        device=index,
        device_tier=TierStats(**raw["device_tier"]),
        extended={name: BackingStats(**counters) for name, counters in raw["extended"].items()},
        host_available_bytes=(
            _C.host_memory()["available_bytes"] if torch.cuda.is_initialized() else 0
        ),
        tags={tag_name(tag): TierStats(**held) for tag, held in raw["tags"].items()},
    )


def reset_peak_stats(device: Device | None = None) -> None:
    """Let every ``reserved_peak_bytes`` of a device start again from the present value.

    Parameters
    ----------
    device : int, str or torch.device, optional
        The device; None or ``"cuda"`` for the current one.

    Raises
    ------
    TypeError, ValueError
        If `device` is not a CUDA device or, once CUDA is up, not one of this machine.
    """
    _C.reset_peak_stats(_device_index(device))


def format_bytes(size: int) -> str:
    """Return a number of bytes for people: ``format_bytes(3 << 30)`` is ``"3.00 GiB"``."""
    for unit, width in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if size >= 1 << width:
            return f"{size / (1 << width):.2f} {unit}"
    return f"{size} B"


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table in plain text: first column to the left, the others to the right.

    Parameters
    ----------
    header : sequence of str, length c
        The titles.
    rows : sequence of sequences of str, length c each
        The cells.

    Returns
    -------
    str
        The lines, joined, without a final line end.
    """
    lines = [list(header), *map(list, rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def memory_summary(device: Device | None = None) -> str:
    """Return a table of what is allocated where.

    Parameters
    ----------
    device : int, str or torch.device, optional
        The device; None or ``"cuda"`` for the current one.

    Returns
    -------
    str
        Several lines of plain text.

    Raises
    ------
    TypeError, ValueError
        If `device` is not a CUDA device or, once CUDA is up, not one of this machine.
    """
    current = stats(device)
    if is_enabled():
        config = get_config()
        state = f"on, mode {config.mode}, threshold {config.threshold_gib:g} GiB"
    else:
        state = "off"
    hbm = current.device_tier
    memory = [
        [
            "device",
            "-",
            format_bytes(hbm.allocated_bytes),
            format_bytes(hbm.reserved_bytes),
            "-",
            "-",
        ]
    ]
    counts = []
    for name, backing in current.extended.items():
        memory.append(
            [
                "extended",
                name,
                format_bytes(backing.allocated_bytes),
                format_bytes(backing.reserved_bytes),
                format_bytes(backing.reserved_peak_bytes),
                str(backing.segments),
            ]
        )
        counts.append(
            [
                name,
                str(backing.allocations),
                str(backing.frees),
                str(backing.segment_allocs),
                str(backing.segment_frees),
                f"{backing.prefetches} ({backing.prefetch_failures})",
                str(backing.advice_failures),
                str(backing.spills),
                f"{backing.limit_refusals} / {backing.reserve_refusals}",
            ]
        )
    return "\n".join(
        [
            f"egm_alloc on cuda:{current.device}: {state}",
            format_table(["tier", "backing", "allocated", "reserved", "peak", "segments"], memory),
            "",
            format_table(
                [
                    "ever",
                    "allocations",
                    "frees",
                    "segment allocs",
                    "segment frees",
                    "prefetches (failed)",
                    "advice failures",
                    "spills",
                    "refused by limit / reserve",
                ],
                counts,
            ),
        ]
    )
