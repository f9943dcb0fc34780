"""Drawing the figures of ``egm-alloc bench`` with matplotlib, which is an optional dependency."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from egm_alloc.cli.measure import Report
from egm_alloc.stats import format_bytes

_READ, _WRITE = "#1f6f8b", "#e0a458"


def check(path: Path) -> None:
    """Find out before anything is measured whether a drawing can be made.

    Parameters
    ----------
    path : Path
        Where it is to go.

    Raises
    ------
    ImportError
        If matplotlib is missing.
    ValueError
        If the file is not a PNG in a folder that exists, or cannot be written.
    """
    if find_spec("matplotlib") is None:
        raise ImportError("--plot needs matplotlib: pip install matplotlib")
    refusal = f"plot is '{path}'; allowed: a file FILE.png in a folder that exists"
    if path.suffix.lower() != ".png" or not path.parent.is_dir():
        raise ValueError(refusal)
    path = path.resolve()  # of a link, what it leads to
    is_new = not path.exists()
    try:
        path.open("ab").close()
        if is_new:
            path.unlink()
    except OSError as error:
        raise ValueError(f"{refusal} and can be written to ({error.strerror})") from None


def draw(report: Report, path: Path) -> None:
    """Draw bandwidths and times of the kinds that were measured.

    Parameters
    ----------
    report : Report
        The figures.
    path : Path
        The PNG to write.
    """
    from matplotlib.figure import Figure  # not pyplot: no window system is asked for

    rows = [row for row in report.rows if row.missing is None]
    figure = Figure(figsize=(11, 5), layout="constrained")
    left, right = figure.subplots(1, 2)
    note = "\nSIMULATED: the figures mean nothing" if report.simulated else ""
    figure.suptitle(f"{report.machine}: a tensor of {format_bytes(report.size_bytes)}{note}")
    kinds = [row.kind for row in rows]
    _bars(
        left,
        kinds,
        {
            "GPU reads": [row.read_gb_per_s or 0 for row in rows],
            "GPU writes": [row.write_gb_per_s or 0 for row in rows],
        },
    )
    left.set(title="Bandwidth in use (more is better)", ylabel="GB/s (log scale)")
    _bars(
        right,
        kinds,
        {
            "allocation": [row.allocation_ms_per_gib or 0 for row in rows],
            "first write by the GPU": [row.first_write_ms_per_gib or 0 for row in rows],
        },
    )
    right.set(title="Time to bring it up (less is better)", ylabel="ms/GiB (log scale)")
    figure.savefig(path, dpi=120)


def _bars(axes: Any, kinds: list[str], series: dict[str, list[float]]) -> None:
    width = 0.38
    for number, ((label, values), colour) in enumerate(
        zip(series.items(), (_READ, _WRITE), strict=True)
    ):
        at = [index + (number - 0.5) * width for index in range(len(kinds))]
        bars = axes.bar(at, values, width, label=label, color=colour, zorder=2)
        axes.bar_label(bars, list(map(_short, values)), fontsize=8, padding=2)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.margins(y=0.1)
    axes.set_xticks(range(len(kinds)), kinds)
    axes.grid(axis="y", color="0.9", zorder=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.07), ncols=2, frameon=False)


def _short(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
