"""Compiles csrc/core with its C++ tests, alone: that it builds shows that it needs nothing else."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = sorted((ROOT / "tests" / "core").glob("*.cpp"))
COMPILE = [
    os.environ.get("CXX", "g++"),
    *["-std=c++17", "-Wall", "-Wextra", "-Werror", "-fsanitize=undefined", "-O1"],
    f"-I{ROOT / 'csrc'}",
]


@pytest.fixture(scope="module")
def core_objects(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("core")
    sources = sorted(str(p) for p in (ROOT / "csrc" / "core").glob("*.cpp"))
    subprocess.run([*COMPILE, "-c", *sources], cwd=folder, check=True)
    return sorted(str(p) for p in folder.glob("*.o"))


def test_there_are_programs() -> None:
    assert PROGRAMS


@pytest.mark.parametrize("source", PROGRAMS, ids=lambda p: p.stem)
def test_core_holds_its_promises(source: Path, core_objects: list[str], tmp_path: Path) -> None:
    program = tmp_path / source.stem
    subprocess.run([*COMPILE, str(source), *core_objects, "-o", str(program)], check=True)
    # The program is plain C++; a simulated device preloaded for the others does not concern it.
    environment = {k: v for k, v in os.environ.items() if k != "LD_PRELOAD"}
    result = subprocess.run(
        [str(program)], capture_output=True, text=True, env=environment, cwd=tmp_path, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
