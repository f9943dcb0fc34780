"""Time egm_alloc beside native torch and the plain pair, and print the ratios.

Every setup has a process of its own. They live side by side and take turns batch by batch, on the
same processor where one is enough, so that a change of the machine during the run meets all of
them. Two processes of one setup may differ by some per cent as long as they live, so all are
started anew for each round. Native torch runs without egm_alloc being imported. A ratio to native
is the median of the ratios of the turns. "Native again" is a second such process: what it differs
by is chance. "Pair" is the plain malloc/free pair as torch's whole allocator: this package's C
pair, which takes the same steps as the one that users have today, or what a library exports under
the same names (--pair).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks import worker

# From (setup, row) to the seconds of one unit of work, turn by turn.
Measurements = dict[tuple[str, str], list[float]]


@dataclass(frozen=True)
class Comparison:
    """One line of the table: a row under a setup against the same row in native torch.

    Parameters
    ----------
    setup, row : str
        As in ``worker.SETUPS``.
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
    *(Comparison("native again", row, None) for row in worker.STEPS),
    Comparison("tiered", worker.SMALL_THREADS, 1.1),
    Comparison("low threshold", worker.NINTH_THREAD, None),
    *(Comparison("managed, recorded", row, 1.5) for row in worker.EVERY_ROW),
]


WARM_UP = 2  # turns that are not counted, of all processes at once
# Steps are held to the narrowest target and vary most: other work on a shared host may make one
# half as long again. The pair's, which are slower by a multiple, need no more turns than others.
STEP_TURNS = 10  # times as many


class Process:
    """A live worker.

    Parameters
    ----------
    setup : str
        As in ``worker.SETUPS``.
    hash_seed : int
        By which Python lays out its dictionaries, at some per cent of a step.
    pair : Path or None
        The library with the pair; None for this package's own.
    """

    def __init__(self, setup: str, hash_seed: int, pair: Path | None = None) -> None:
        environment = {k: v for k, v in os.environ.items() if not k.startswith("EGM_ALLOC_")}
        environment |= {"EGM_ALLOC_AUTO_ENABLE": "0", "PYTHONHASHSEED": str(hash_seed)}
        self.setup = setup
        self._process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "benchmarks.worker",
                setup,
                *([str(pair.absolute())] if pair else []),
            ],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[1],
        )

    def ask(self, row: str) -> None:
        """Let it time one batch of a row."""
        assert self._process.stdin is not None
        self._process.stdin.write(row + "\n")
        self._process.stdin.flush()

    def answer(self) -> float | None:
        """Wait for the batch's seconds; None if it was skipped."""
        assert self._process.stdout is not None
        answer = self._process.stdout.readline().strip()
        if not answer:
            raise SystemExit(f"benchmarks: the process of {self.setup!r} ended")
        return None if answer == "skipped" else float(answer)

    def end(self) -> None:
        """Let it end, and wait."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def turns_of(row: str, turns: int) -> int:
    """Return how many turns of a row count."""
    if row in worker.STEPS:
        return STEP_TURNS * turns
    return turns if row in worker.ALLOCATIONS else max(1, turns // 2)


def measure(turns: int, only: str, measurements: Measurements, pair: Path | None = None) -> None:
    """Time every row under every setup that has it, taking turns, in new processes."""
    hash_seed = random.randrange(1 << 32)
    processes = [Process(setup, hash_seed, pair) for setup in worker.SETUPS]
    for row in worker.SETUPS["native"]:
        if only not in row:
            continue
        print(f"timing: {row}", file=sys.stderr, flush=True)
        taking_part = [each for each in processes if row in worker.SETUPS[each.setup]]
        for _ in range(WARM_UP):
            for process in taking_part:
                process.ask(row)
            for process in taking_part:
                process.answer()
        without_pair = [each for each in taking_part if each.setup != "pair"]
        for turn in range(turns_of(row, turns)):
            now = without_pair if row in worker.STEPS and turn % STEP_TURNS else taking_part
            # In no fixed order: who comes after whom should not matter.
            for process in random.sample(now, len(now)):
                process.ask(row)
                seconds = process.answer()
                if seconds is not None:
                    measurements[process.setup, row].append(seconds)
        for process in taking_part:
            process.ask("")
            process.answer()
    for process in processes:
        process.end()


def _ratio(ours: list[float], other: list[float]) -> float:
    """Return the median over the turns of ours divided by the other."""
    return statistics.median(a / b for a, b in zip(ours, other, strict=True))


def _microseconds(seconds: list[float] | None) -> str:
    return f"{statistics.median(seconds) * 1e6:.2f}" if seconds else "-"


def compare(measurements: Measurements, only: str = "") -> tuple[list[list[str]], bool]:
    """Return the lines of the table and whether every target is met."""
    lines, met = [], True
    for comparison in COMPARISONS:
        if only not in comparison.row:
            continue
        ours = measurements.get((comparison.setup, comparison.row))
        native = measurements.get(("native", comparison.row))
        if not ours or not native:
            unmeasured = [comparison.row, comparison.setup, *["-"] * 6, "not measured"]
            lines.append(unmeasured)
            met = False
            continue
        pair = measurements.get(("pair", comparison.row))
        ratio = _ratio(ours, native)
        ok = comparison.target is None or ratio <= comparison.target
        times_faster = statistics.median(pair) / statistics.median(ours) if pair else None
        if comparison.faster_than_pair is not None:
            ok = ok and times_faster is not None and times_faster >= comparison.faster_than_pair
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
                f"{times_faster:.1f}" if times_faster else "-",
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
    parser.add_argument("--rounds", type=int, default=10, help="of new processes (default 10)")
    parser.add_argument(
        "--turns",
        type=int,
        default=4,
        help=f"per row and round (default 4); steps have {STEP_TURNS} times as many, threads half",
    )
    parser.add_argument("--only", default="", metavar="TEXT", help="rows with TEXT in their name")
    parser.add_argument(
        "--pair",
        type=Path,
        metavar="LIBRARY",
        help="with managed_malloc and managed_free, instead of this package's own",
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="also write every measurement, round by round"
    )
    arguments = parser.parse_args()
    if arguments.turns < 1 or arguments.rounds < 1:
        parser.error("--turns and --rounds must be at least 1")
    if arguments.pair is not None and not arguments.pair.is_file():
        parser.error(f"--pair is '{arguments.pair}'; allowed: a file")
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks: no GPU here")
    name = torch.cuda.get_device_name()
    measurements: Measurements = defaultdict(list)
    for number in range(1, arguments.rounds + 1):
        print(f"round {number} of {arguments.rounds}", file=sys.stderr, flush=True)
        measure(arguments.turns, arguments.only, measurements, arguments.pair)
        if arguments.json:
            raw = [
                {"setup": setup, "row": row, "seconds": seconds}
                for (setup, row), seconds in measurements.items()
            ]
            arguments.json.write_text(json.dumps(raw, indent=1))
    lines, met = compare(measurements, arguments.only)
    print(
        f"torch {torch.__version__}, {name}; medians of {arguments.rounds} rounds of "
        f"{arguments.turns} turns, {STEP_TURNS} times as many for steps, half for threads; "
        "ratio = ours / native, turn by turn\n"
    )
    print(markdown(lines))
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
