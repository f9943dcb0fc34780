"""The benchmarks' own arithmetic, and that demo and soak run on the simulated device."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import __main__ as benchmarks
from benchmarks.__main__ import COMPARISONS, Measurements, compare, markdown
from benchmarks.worker import ALLOCATIONS, SETUPS

ROOT = Path(__file__).parents[2]


def test_every_comparison_is_measured() -> None:
    for comparison in COMPARISONS:
        assert comparison.row in SETUPS[comparison.setup]
        assert comparison.row in SETUPS["native"]
    assert SETUPS["managed, recorded"] == SETUPS["native"]


def test_ratio_is_taken_turn_by_turn_and_decides() -> None:
    measurements: Measurements = {
        ("native", "alloc 64 MiB"): [2e-6, 1e-6, 8e-6],
        ("low threshold", "alloc 64 MiB"): [2.5e-6, 1.5e-6, 8e-6],
        ("tiered", "alloc 64 MiB"): [2e-6, 1e-6, 8e-6],
        ("managed, recorded", "alloc 64 MiB"): [2e-6, 1e-6, 8e-6],
        ("pair", "alloc 64 MiB"): [500e-6, 300e-6, 900e-6],
    }
    lines, met = compare(measurements, only="alloc 64 MiB")
    line = next(line for line in lines if line[1] == "low threshold")
    assert line == [
        "alloc 64 MiB", "low threshold", "2.00", "2.50", "500.00", "1.250", "200.0",
        "1.5, pair/100", "ok",
    ]  # fmt: skip
    assert met


@pytest.mark.parametrize(("ours", "pair"), [(4e-6, 800e-6), (2e-6, 100e-6)])
def test_missed_target_is_said(ours: float, pair: float) -> None:
    row = ALLOCATIONS[2]
    measurements: Measurements = {
        ("native", row): [2e-6],
        ("low threshold", row): [ours],
        ("pair", row): [pair],
    }
    lines, met = compare(measurements, only="alloc 64 MiB")
    said = {line[1]: line[-1] for line in lines}
    assert said["low threshold"] == "MISSED"
    assert said["tiered"] == "not measured"
    assert not met


def test_table_is_markdown() -> None:
    table = markdown([["a"] * 9]).splitlines()
    assert table[0].startswith("| row ")
    assert set(table[1]) == set("|- ")
    assert len({len(line) for line in table}) == 1


def run(*command: str) -> subprocess.CompletedProcess[str]:
    """Run a script of the repository on the simulated machine that this process is on."""
    return subprocess.run(
        [sys.executable, *command],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"},
        check=False,
    )


def test_rounds_start_every_process_anew(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    started: list[str] = []
    seeds: list[int] = []

    class Process:
        def __init__(self, setup: str, hash_seed: int, pair: Path | None) -> None:
            assert pair is None
            self.setup = setup
            started.append(setup)
            seeds.append(hash_seed)

        def ask(self, row: str) -> None:
            pass

        def answer(self) -> float:
            return 1e-6 * len(started)  # the same for all of a round

        def end(self) -> None:
            pass

    monkeypatch.setattr(benchmarks, "Process", Process)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "a device")
    file = tmp_path / "raw.json"
    arguments = ["--rounds", "2", "--turns", "3", "--only", "alloc 4 KiB", "--json", str(file)]
    monkeypatch.setattr("sys.argv", ["benchmarks", *arguments])
    assert benchmarks.main() == 0
    assert started == 2 * list(SETUPS)
    assert [len(set(seeds[: len(SETUPS)])), len(set(seeds))] == [1, 2]
    (native,) = [m for m in json.loads(file.read_text()) if m["setup"] == "native"]
    first = 1e-6 * len(SETUPS)
    assert native["seconds"] == pytest.approx([first] * 3 + [2 * first] * 3)
    assert "medians of 2 rounds of 3 turns" in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", ["benchmarks", *arguments[:5], "inference", *arguments[6:]])
    benchmarks.main()
    turns = {m["setup"]: len(m["seconds"]) for m in json.loads(file.read_text())}
    assert turns.pop("pair") == 2 * 3
    assert set(turns.values()) == {2 * 3 * benchmarks.STEP_TURNS}
    for wrong in (["--rounds", "0"], ["--pair", str(tmp_path / "missing.so")]):
        monkeypatch.setattr("sys.argv", ["benchmarks", *wrong])
        with pytest.raises(SystemExit):
            benchmarks.main()


@pytest.mark.simulated
def test_demo_runs_and_says_that_it_is_simulated() -> None:
    result = run("examples/demo.py", "--steps", "4")
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("simulated: ")
    assert "loss," not in result.stdout
    assert "key-value cache" in result.stdout


@pytest.mark.simulated
def test_ddp_example_says_in_a_sentence_what_it_needs() -> None:
    result = run("examples/ddp.py")
    assert result.returncode == 1
    assert result.stderr.startswith("ddp: this needs two real GPUs")
    assert len(result.stderr.splitlines()) == 1
    assert result.stdout == ""


@pytest.mark.simulated
def test_training_beyond_hbm_puts_moments_on_the_host() -> None:
    command = ["-m", "tests.simulator", "--hbm-gib", "4", "--", sys.executable]
    result = run(*command, "examples/beyond_hbm.py", "--small")
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.startswith("Simulated device: ")
    rows = {line.split()[0]: line for line in result.stdout.splitlines() if line}
    assert "pinned" in rows["place"]
    assert "pinned" in rows["spill"]
    assert "pinned" not in rows["native"]


@pytest.mark.simulated
@pytest.mark.parametrize("mode", ["tiered", "managed"])
def test_soak_finds_no_growth(mode: str) -> None:
    command = ["-m", "tests.simulator", "--hbm-gib", "400", "--", sys.executable]
    result = run(*command, "benchmarks/soak.py", "--operations", "20000", "--mode", mode)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.simulated
def test_pair_may_come_from_another_library(tmp_path: Path) -> None:
    source = tmp_path / "pair.cpp"
    source.write_text(
        """
        #include <cstddef>
        #include <cstdio>
        extern "C" int cudaMalloc(void**, size_t);
        extern "C" int cudaFree(void*);
        extern "C" void* managed_malloc(size_t size, int, void*) {
          std::fputs("another pair\\n", stderr);
          void* base = nullptr;
          return cudaMalloc(&base, size) == 0 ? base : nullptr;
        }
        extern "C" void managed_free(void* base, size_t, int, void*) { cudaFree(base); }
        """
    )
    library = tmp_path / "pair.so"
    subprocess.run(["g++", "-shared", "-fPIC", str(source), "-o", str(library)], check=True)
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.worker", "pair", str(library)],
        input="alloc 4 KiB\n",
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "EGM_ALLOC_AUTO_ENABLE": "0"},
        check=True,
    )
    assert float(done.stdout) > 0
    assert "another pair" in done.stderr
