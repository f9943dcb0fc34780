"""``egm-alloc bench``: how fast each kind of memory of this machine is, for one large tensor."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from egm_alloc.cli import plot
from egm_alloc.cli.measure import KINDS, Report, check_room, measure
from egm_alloc.cli.text import wrapped
from egm_alloc.config import check_device_index
from egm_alloc.control import enable, is_enabled
from egm_alloc.machine import device_count
from egm_alloc.stats import format_bytes, format_table

_GIB = 1 << 30
_BAR_WIDTH = 20
_LEAST_GIB = 1 / 1024  # below that a pool's segment is larger than the tensor
_MEANINGLESS = "SIMULATED device: kernels do nothing, and these figures mean nothing."
_LEGEND = (
    "allocation: the first one, with nothing cached; first write: of fresh memory, by the GPU; "
    "read and write: by the GPU, when the memory has been used before; cached: allocating and "
    "freeing once more."
)


def _kinds(text: str) -> tuple[str, ...]:
    kinds = tuple(part.strip() for part in text.split(","))
    if not set(kinds) <= set(KINDS) or len(set(kinds)) != len(kinds):
        allowed = ", ".join(KINDS)
        raise argparse.ArgumentTypeError(
            f"kinds is {text!r}; allowed: a list, separated by commas, of {allowed}, each once"
        )
    return kinds


def _size_bytes(text: str) -> int:
    allowed = "a number of GiB from 0.001 up"
    try:
        size = float(text)
    except ValueError:
        size = 0.0
    if not _LEAST_GIB <= size < 1 << 33:
        raise argparse.ArgumentTypeError(f"size_gib is {text!r}; allowed: {allowed}")
    return int(size * _GIB)


def _device(text: str) -> int:
    try:
        return check_device_index("device", int(text) if text.isdecimal() else text)
    except ValueError:
        allowed = "an index such as 0, or cuda:0"
        raise argparse.ArgumentTypeError(f"device is {text!r}; allowed: {allowed}") from None


def add_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to a parser."""
    parser = commands.add_parser(
        "bench",
        help="measure how fast each kind of memory of this machine is",
        description="Measure allocation, GPU reads and GPU writes of one large tensor in each kind "
        "of memory of this machine. Never holds more than half of the HBM that is free and half of "
        "the host memory that is available.",
    )
    parser.add_argument(
        "--size-gib",
        type=_size_bytes,
        default=_GIB,
        dest="size_bytes",
        metavar="GIB",
        help="size of the tensor (default: 1)",
    )
    parser.add_argument(
        "--kinds",
        type=_kinds,
        default=KINDS,
        help=f"which kinds, separated by commas (default: {','.join(KINDS)})",
    )
    parser.add_argument("--device", type=_device, default=0, help="which device (default: 0)")
    parser.add_argument("--json", action="store_true", help="the figures as JSON")
    parser.add_argument(
        "--plot", type=Path, metavar="FILE.png", help="also draw them; needs matplotlib"
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Measure and print; return 1 with a sentence on stderr where that is not possible."""
    try:
        if options.plot is not None:
            plot.check(options.plot)
        if not is_enabled():
            enable()
        count = device_count()
        if count is not None and options.device >= count:
            raise ValueError(
                f"device is {options.device}; allowed: an index below {count}, "
                "the number of CUDA devices here"
            )
        check_room(options.size_bytes, options.kinds, options.device)
    except (TypeError, ValueError, RuntimeError, ImportError) as error:
        print(f"egm-alloc bench: {error}", file=sys.stderr)
        return 1
    report = measure(options.size_bytes, options.kinds, options.device, _Bar(options.kinds))
    print(json.dumps(dataclasses.asdict(report), indent=2) if options.json else in_words(report))
    if all(row.missing is not None for row in report.rows):
        _progress("nothing could be measured")
        return 1
    if options.plot is not None:
        plot.draw(report, options.plot)
        _progress(f"drawn in {options.plot}")
    return 0


class _Bar:
    """Says which kind is being measured: a bar on a terminal, else a line for each."""

    def __init__(self, kinds: Sequence[str]) -> None:
        self._kinds = list(kinds)

    def __call__(self, kind: str) -> None:
        """Show that a kind is next."""
        done, of = self._kinds.index(kind), len(self._kinds)
        if not sys.stderr.isatty():
            _progress(kind)
            return
        bar = "#" * (_BAR_WIDTH * done // of)
        text = f"\regm-alloc bench: [{bar:<{_BAR_WIDTH}}] {done} of {of}, {kind:8s}"
        print(text, end="" if done + 1 < of else "\n", file=sys.stderr, flush=True)


def _progress(text: str) -> None:
    print(f"egm-alloc bench: {text}", file=sys.stderr, flush=True)


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def in_words(report: Report) -> str:
    """Return the figures as a table, with what it means and what is missing."""
    header = [
        "kind",
        "allocation ms/GiB",
        "first write ms/GiB",
        "read GB/s",
        "write GB/s",
        "cached us",
    ]
    rows = [
        [
            row.kind,
            _number(row.allocation_ms_per_gib, 2),
            _number(row.first_write_ms_per_gib, 2),
            _number(row.read_gb_per_s, 1),
            _number(row.write_gb_per_s, 1),
            _number(row.cached_us, 2),
        ]
        for row in report.rows
    ]
    lines = [
        f"{report.machine} (cuda:{report.device}), torch {torch.__version__}, "
        f"a tensor of {format_bytes(report.size_bytes)}",
        *([_MEANINGLESS] if report.simulated else []),
        "",
        format_table(header, rows),
        "",
        wrapped(_LEGEND),
    ]
    if any(row.kind == "split" for row in report.rows):
        lines.append(f"split: {report.device_fraction:g} of the tensor is in HBM.")
    lines += [
        wrapped(f"{row.kind}: not measured: {row.missing}")
        for row in report.rows
        if row.missing is not None
    ]
    return "\n".join(lines)
