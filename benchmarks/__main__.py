"""Time egm_alloc beside native torch and the plain pair, and print the ratios.

Every setup runs in fresh processes, one after the other, round after round, so that a change of the
machine during the run meets all of them. Native torch runs without egm_alloc being imported.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks import worker

# From (setup, row) to one number of seconds per round.
Measurements = dict[tuple[str, str], list[float]]


@dataclass(frozen=True)
class Comparison:
    """One line of the table: a row under a setup against the same row in native torch.

    Parameters
    ----------
    setup, row : str
        As in ``worker.PLAN``.
    target : float or None
        The most that the ratio to native may be; None if it is only reported.
    faster_than_pair : float or None
        How many times faster than the pair it must be; None if that is only reported.
    """

    setup: str
    row: str
    target: float | None
    faster_than_pair: float | None = None


COMPARISONS = [
    *(Comparison("tiered", row, 1.1) for row in worker.ALLOCATIONS[:3]),
    Comparison("low threshold", "alloc 64 MiB", 1.5, 100),
    Comparison("low threshold", "alloc 1 GiB", 1.5, 100),
    Comparison("low threshold", "alloc 3 GiB", 1.5),
    *(Comparison("tiered", row, 1.03) for row in worker.STEPS),
    *(Comparison("managed", row, 1.03) for row in worker.STEPS),
    Comparison("tiered", worker.SMALL_THREADS, 1.1),
    Comparison("low threshold", worker.NINTH_THREAD, None),
    *(Comparison("managed, recorded", row, 1.5) for row in worker.EVERY_ROW),
]


def measure(rounds: int, only: str) -> Measurements:
    """Run every process `rounds` times, in turn, and gather what they print."""
    measurements: Measurements = defaultdict(list)
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith("EGM_ALLOC_")
    }
    environment["EGM_ALLOC_AUTO_ENABLE"] = "0"
    root = Path(__file__).parents[1]
    for number in range(1, rounds + 1):
        for process in worker.PLAN:
            print(f"round {number} of {rounds}: {process}", file=sys.stderr, flush=True)
            result = subprocess.run(
                [sys.executable, "-m", "benchmarks.worker", process, only],
                env=environment,
                stdout=subprocess.PIPE,
                text=True,
                cwd=root,
                check=False,
            )
            if result.returncode != 0:
                raise SystemExit(f"benchmarks: {process} failed with status {result.returncode}")
            for line in result.stdout.splitlines():
                found = json.loads(line)
                measurements[found["setup"], found["row"]].append(found["seconds"])
    return measurements


def _microseconds(seconds: list[float] | None) -> str:
    return f"{statistics.median(seconds) * 1e6:.2f}" if seconds else "-"


def compare(measurements: Measurements) -> tuple[list[list[str]], bool]:
    """Return the lines of the table and whether every target is met."""
    lines, met = [], True
    for comparison in COMPARISONS:
        ours = measurements.get((comparison.setup, comparison.row))
        native = measurements.get(("native", comparison.row))
        if not ours or not native:
            continue
        pair = None
        if comparison.setup == "low threshold":
            pair = measurements.get(("pair", comparison.row))
        ratio = statistics.median(ours) / statistics.median(native)
        ok = comparison.target is None or ratio <= comparison.target
        times_faster = statistics.median(pair) / statistics.median(ours) if pair else None
        if comparison.faster_than_pair is not None and times_faster is not None:
            ok = ok and times_faster >= comparison.faster_than_pair
        met = met and ok
        target = "reported" if comparison.target is None else f"{comparison.target:g}"
        if comparison.faster_than_pair is not None:
            target += f", pair/{comparison.faster_than_pair:g}"
        lines.append(
            [
                comparison.row,
                comparison.setup,
                _microseconds(native),
                _microseconds(ours),
                _microseconds(pair),
                f"{ratio:.3f}",
                f"{times_faster:.0f}" if times_faster else "-",
                target,
                "ok" if ok else "MISSED",
            ]
        )
    return lines, met


HEADER = ["row", "setup", "native us", "ours us", "pair us", "ratio", "pair/ours", "target", "ok"]


def markdown(lines: list[list[str]]) -> str:
    """Return the table in Markdown, padded so that it also reads well as plain text."""
    cells = [HEADER, *lines]
    widths = [max(len(line[column]) for line in cells) for column in range(len(HEADER))]
    cells.insert(1, ["-" * width for width in widths])
    return "\n".join(
        "| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |"
        for line in cells
    )


def main() -> int:
    """Measure, print the table; return 0 if every target is met."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="rounds of processes (default 3)")
    parser.add_argument("--only", default="", metavar="TEXT", help="rows with TEXT in their name")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write every measurement")
    arguments = parser.parse_args()
    if arguments.rounds < 1:
        parser.error("--rounds must be at least 1")
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks: no GPU here")
    name = torch.cuda.get_device_name()
    measurements = measure(arguments.rounds, arguments.only)
    lines, met = compare(measurements)
    print(
        f"torch {torch.__version__}, {name}; medians of {arguments.rounds} rounds; "
        "ratio = ours / native\n"
    )
    print(markdown(lines))
    if arguments.json:
        raw = [
            {"setup": setup, "row": row, "seconds": seconds}
            for (setup, row), seconds in measurements.items()
        ]
        arguments.json.write_text(json.dumps(raw, indent=1))
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
