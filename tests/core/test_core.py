"""Compiles csrc/core with its C++ tests, alone: that it builds shows that it needs nothing else."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_core_holds_its_promises(tmp_path: Path) -> None:
    program = tmp_path / "test_core"
    sources = sorted(str(p) for p in (ROOT / "csrc" / "core").glob("*.cpp"))
    compiler = os.environ.get("CXX", "g++")
    flags = ["-std=c++17", "-Wall", "-Wextra", "-Werror", "-fsanitize=undefined", "-O1"]
    test = str(ROOT / "tests" / "core" / "test_core.cpp")
    subprocess.run(
        [compiler, *flags, f"-I{ROOT / 'csrc'}", test, *sources, "-o", str(program)], check=True
    )
    # The program is plain C++; a simulated device preloaded for the others does not concern it.
    environment = {k: v for k, v in os.environ.items() if k != "LD_PRELOAD"}
    result = subprocess.run(
        [str(program)], capture_output=True, text=True, env=environment, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
