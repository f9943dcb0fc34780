"""Scratch source trees and environments for the tests of the build."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]

_STUB = """
#include <Python.h>
#include <cuda_runtime_api.h>
#include <egm_alloc_torch_features.h>
static PyModuleDef stub = {PyModuleDef_HEAD_INIT, "_C", 0, -1, 0, 0, 0, 0, 0};
PyMODINIT_FUNC PyInit__C() { return PyModule_Create(&stub); }
"""


def copy_tree(target: Path, csrc: bool) -> Path:
    """Copy the sources, with a one-file extension in place of the real one unless `csrc`."""
    target.mkdir()
    for name in (
        *("setup.py", "pyproject.toml", "MANIFEST.in", "LICENSE", "README.md"),
        *("egm_alloc_command.py", "egm_alloc_vllm.py"),
    ):
        shutil.copy(ROOT / name, target)
    generated = shutil.ignore_patterns("*.so", "_build_info.py", "include", "__pycache__")
    for folder in ("build_backend", "egm_alloc"):
        shutil.copytree(ROOT / folder, target / folder, ignore=generated)
    if csrc:
        shutil.copytree(ROOT / "csrc", target / "csrc")
    else:
        (target / "csrc" / "c_api").mkdir(parents=True)
        shutil.copy(ROOT / "csrc/c_api/egm_alloc.h", target / "csrc/c_api")
        (target / "csrc" / "stub.cpp").write_text(_STUB)
    return target


def hide_toolkit(tree: Path) -> None:
    """Make a source tree look for the default toolkit where there is none."""
    module = tree / "build_backend" / "cuda_headers.py"
    text = module.read_text()
    hidden = text.replace('"/usr/local/cuda"', '"/nonexistent"')
    assert hidden != text
    module.write_text(hidden)


def clean_environment(**variables: str) -> dict[str, str]:
    """Return the environment without toolkit, simulator, or what shows packages to Python."""
    hidden = {"CUDA_HOME", "CUDA_PATH", "CONDA_PREFIX", "CPATH", "CPLUS_INCLUDE_PATH"}
    hidden |= {"LD_PRELOAD", "PYTHONPATH", "VIRTUAL_ENV"}
    return {k: v for k, v in os.environ.items() if k not in hidden} | variables


def run(*command: str | Path, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a command in the clean environment and capture all that it prints, in one."""
    return subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=clean_environment(**variables),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )


def site_packages(venv: Path) -> Path:
    """Return the folder of a virtual environment's own packages."""
    return venv / f"lib/python{sys.version_info[0]}.{sys.version_info[1]}/site-packages"


@pytest.fixture
def make_venv(tmp_path: Path) -> Callable[..., Path]:
    """Make a virtual environment that sees the given folders through a ``.pth`` file."""

    def make(*folders: str | Path) -> Path:
        venv = tmp_path / "venv"
        done = run(sys.executable, "-m", "venv", venv, cwd=tmp_path)
        assert done.returncode == 0, done.stdout
        lines = "".join(f"{folder}\n" for folder in folders)
        (site_packages(venv) / "seen.pth").write_text(lines)
        return venv

    return make


@pytest.fixture
def torch_folders() -> list[str]:
    """The folders on the import path that hold the torch in use and what it needs."""
    folders = [folder for folder in sys.path if "-packages" in folder]
    return list(dict.fromkeys([*folders, str(Path(torch.__file__).parents[1])]))
