"""The command that measures each kind of memory: what it prints, refuses and leaves behind."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import egm_alloc
from egm_alloc.cli import main, measure, plot
from egm_alloc.cli.measure import KINDS, check_room
from egm_alloc.host import diagnose_host
from tests.python.processes import run_without_gpu
from tests.simulator import sim

pytestmark = pytest.mark.simulated

MIB, GIB = 1 << 20, 1 << 30
SMALL = ["--size-gib", "0.01"]


def run_bench(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, dict[str, Any]]:
    """Return the rows of a run with these arguments, by kind."""
    assert main(["bench", *SMALL, "--json", *arguments]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    return {row["kind"]: row for row in rows}


def with_host(monkeypatch: pytest.MonkeyPatch, **changes: int | None) -> None:
    """Let the host be another."""
    host = dataclasses.replace(diagnose_host(), **changes)  # type: ignore[arg-type]
    monkeypatch.setattr(measure, "diagnose_host", lambda: host)


def test_table_has_every_kind_and_says_simulated(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *SMALL]) == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert lines[0].startswith("Simulated H200 (cuda:0), torch ")
    assert lines[0].endswith("a tensor of 10.24 MiB")
    assert lines[1].startswith("SIMULATED")
    assert max(map(len, lines)) <= 100
    table = {line.split()[0]: line.split()[1:] for line in lines[5:10]}
    assert tuple(table) == KINDS
    for cells in table.values():
        assert len(cells) == 5
        assert all(float(cell) >= 0 for cell in cells)
    assert err.splitlines() == [f"egm-alloc bench: {kind}" for kind in KINDS]


def test_terminal_gets_a_bar(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    assert main(["bench", *SMALL, "--kinds", "device,pinned"]) == 0
    bars = capsys.readouterr().err.split("\r")[1:]
    assert [bar.split("] ")[1].strip() for bar in bars] == ["0 of 2, device", "1 of 2, pinned"]
    assert [bar.count("#") for bar in bars] == [0, 10]


def test_what_is_too_small_to_be_split_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--size-gib", "0.005", "--json"]) == 0
    rows = {row["kind"]: row for row in json.loads(capsys.readouterr().out)["rows"]}
    assert rows["split"]["missing"] == "tensors below 10 MiB are not split"
    assert rows["numa"]["missing"] is None


def test_json_has_the_figures(capsys: pytest.CaptureFixture[str]) -> None:
    rows = run_bench(capsys, "--kinds", "pinned,device")
    assert list(rows) == ["pinned", "device"]
    for row in rows.values():
        assert row.pop("missing") is None
        assert all(value > 0 for name, value in row.items() if name != "kind")


@pytest.mark.parametrize(
    ("kind", "call"),
    [
        ("device", "cudaMalloc"),
        ("managed", "cudaMallocManaged"),
        ("pinned", "cudaHostRegister"),
        ("numa", "cuMemCreate"),
    ],
)
def test_kind_is_measured_in_its_own_memory(
    kind: str, call: str, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = {"cudaMallocManaged", "cudaHostRegister", "cuMemCreate"}
    with sim.call_log() as log:
        run_bench(capsys, "--kinds", kind)
    assert call in log.names
    assert calls & set(log.names) == calls & {call}


def test_allocation_is_timed_by_the_gib(capsys: pytest.CaptureFixture[str]) -> None:
    with sim.stall_call("cudaMallocManaged", seconds=0.1):
        row = run_bench(capsys, "--kinds", "managed")["managed"]
    assert row["allocation_ms_per_gib"] >= 100 / 0.01
    assert row["cached_us"] < 50_000


def test_first_write_is_timed_apart(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "seconds", lambda work, repeats=1: (work(), 0.5)[1])
    row = run_bench(capsys, "--kinds", "managed")["managed"]
    size = int(0.01 * GIB)
    assert row["allocation_ms_per_gib"] == pytest.approx(500 / 0.01)
    assert row["first_write_ms_per_gib"] == pytest.approx(500 / 0.01)
    assert row["read_gb_per_s"] == row["write_gb_per_s"] == pytest.approx(size / 0.5 / 1e9)
    assert row["cached_us"] == pytest.approx(500)


def test_one_kind_at_a_time_is_held_and_nothing_is_left(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[int] = []
    original = measure._measure_kind

    def watched(kind: str, size_bytes: int) -> measure.Row:
        held.append(egm_alloc.stats(1).extended_tier.reserved_bytes)
        return original(kind, size_bytes)

    monkeypatch.setattr(measure, "_measure_kind", watched)
    egm_alloc.reset_peak_stats(1)
    before = egm_alloc.stats(0)
    run_bench(capsys, "--device", "cuda:1")
    assert held == [0] * len(KINDS)
    stats = egm_alloc.stats(1)
    assert stats.extended_tier.reserved_bytes == 0
    for backing in KINDS:
        assert stats.extended[backing].reserved_peak_bytes == 12 * MIB, backing
    assert egm_alloc.stats(0) == before


def test_kind_that_the_machine_lacks_says_why(capsys: pytest.CaptureFixture[str]) -> None:
    with (
        sim.fail_call("cuMemCreate", error="CUDA_ERROR_NOT_SUPPORTED", times=-1),
        sim.fail_call("cudaMallocManaged", error="cudaErrorNotSupported", times=-1),
    ):
        assert main(["bench", *SMALL, "--kinds", "managed,numa,pinned"]) == 0
    lines = capsys.readouterr().out.splitlines()
    table = {line.split()[0]: line.split()[1:] for line in lines[5:8]}
    assert table["managed"] == table["numa"] == ["-"] * 5
    assert "-" not in table["pinned"]
    text = " ".join(lines)
    assert "managed: not measured: cudaMallocManaged failed with cudaErrorNotSupported" in text
    assert "numa: not measured: cuMemCreate failed with cudaErrorNotSupported" in text
    assert max(map(len, lines)) <= 100


def test_nothing_measured_is_a_failure(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    drawing = tmp_path / "bench.png"
    with sim.fail_call("cudaMallocManaged", error="cudaErrorNotSupported", times=-1):
        assert main(["bench", *SMALL, "--kinds", "managed"]) == 1
    assert "nothing could be measured" in capsys.readouterr().err
    assert not drawing.exists()


def test_limit_of_the_configuration_is_a_reason(capsys: pytest.CaptureFixture[str]) -> None:
    egm_alloc.enable(limit_gib=0.001)
    assert main(["bench", *SMALL, "--json", "--kinds", "managed"]) == 1
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    assert row["read_gb_per_s"] is None
    assert "Raise limit_gib" in row["missing"]


@pytest.mark.parametrize(
    ("kind", "most_gib", "of"),
    [
        ("device", 4, "free HBM"),
        ("managed", 4, "free HBM"),
        ("pinned", 8, "available host memory"),
        ("numa", 8, "available host memory"),
        ("split", 8, "free HBM"),
    ],
)
def test_more_than_half_of_what_is_free_is_refused(
    kind: str, most_gib: int, of: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (8 * GIB, 80 * GIB))
    with_host(monkeypatch, available_bytes=16 * GIB)
    check_room(most_gib * GIB, [kind], 0)
    with pytest.raises(ValueError, match=rf"^size_gib is {most_gib}.*kind '{kind}' .* {of}\)$"):
        check_room(most_gib * GIB + MIB, [kind], 0)


def test_carve_out_is_what_mapped_memory_is_measured_in(monkeypatch: pytest.MonkeyPatch) -> None:
    with_host(monkeypatch, available_bytes=2 * GIB, egm_bytes=16 * GIB)
    check_room(8 * GIB, ["numa"], 0)
    with pytest.raises(ValueError, match=r"half of the 16.00 GiB of the EGM carve-out"):
        check_room(9 * GIB, ["numa"], 0)
    with pytest.raises(ValueError, match=r"half of the 2.00 GiB of available host memory"):
        check_room(8 * GIB, ["pinned"], 0)


def test_size_that_a_refusal_allows_is_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    with_host(monkeypatch, available_bytes=14_001_000_000)
    with pytest.raises(ValueError, match="at most") as refused:
        check_room(8 * GIB, ["pinned"], 0)
    (most,) = re.findall(r"at most ([\d.]+) with", str(refused.value))
    check_room(int(float(most) * GIB), ["pinned"], 0)
    assert float(most) > 6.5


def test_refusal_is_a_sentence_and_allocates_nothing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with_host(monkeypatch, available_bytes=None)
    with sim.call_log() as log:
        assert main(["bench", "--kinds", "pinned"]) == 1
    assert not {"cudaHostRegister", "cudaMalloc", "cudaMallocManaged"} & set(log.names)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("egm-alloc bench: size_gib is 1; allowed: at most 0.000 with the kind")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--size-gib", "0"], "size_gib is '0'; allowed: a number of GiB"),
        (["--size-gib", "nan"], "size_gib is 'nan'; allowed: "),
        (["--size-gib", "much"], "size_gib is 'much'; allowed: "),
        (["--kinds", "hbm"], "kinds is 'hbm'; allowed: a list"),
        (["--kinds", "numa,numa"], "kinds is 'numa,numa'; allowed: a list"),
        (["--kinds", ""], "kinds is ''; allowed: a list"),
        (["--device", "cpu"], "device is 'cpu'; allowed: an index"),
        (["--device", "-1"], "device is '-1'; allowed: an index"),
    ],
)
def test_bad_argument_is_refused_by_name(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["bench", *arguments])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_device_that_is_missing_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--device", "7"]) == 1
    assert "device is 7; allowed: an index below 2" in capsys.readouterr().err


def test_missing_matplotlib_is_one_sentence(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(plot, "find_spec", lambda _: None)
    assert main(["bench", *SMALL, "--plot", str(tmp_path / "bench.png")]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err == ("egm-alloc bench: --plot needs matplotlib: pip install matplotlib\n")


def test_plot_goes_where_a_link_leads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(plot, "find_spec", lambda _: object())
    link = tmp_path / "link.png"
    link.symlink_to("target.png")
    plot.check(link)
    assert link.is_symlink()
    assert not link.exists()  # nothing was left there


@pytest.mark.parametrize("name", ["bench.jpg", "missing/bench.png", "folder.png"])
def test_bad_file_for_the_plot_is_refused(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(plot, "find_spec", lambda _: object())
    (tmp_path / "folder.png").mkdir()
    assert main(["bench", *SMALL, "--plot", str(tmp_path / name)]) == 1
    out, err = capsys.readouterr()
    assert "plot is '" in err
    assert out == ""  # before anything was measured
    assert [path.name for path in tmp_path.iterdir()] == ["folder.png"]


def test_plot_is_drawn(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    drawing = tmp_path / "bench.png"
    run_bench(capsys, "--kinds", "device,managed", "--plot", str(drawing))
    assert drawing.read_bytes().startswith(b"\x89PNG")


def test_without_a_gpu_it_is_refused() -> None:
    result = run_without_gpu(
        "import sys; from egm_alloc.cli import main; sys.exit(main(['bench']))",
        EGM_ALLOC_AUTO_ENABLE="0",
    )
    assert result.returncode == 1
    assert result.stderr.startswith("egm-alloc bench: egm_alloc needs a CUDA GPU: ")
    assert result.stdout == ""
