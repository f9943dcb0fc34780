"""Builds the simulator's shared object when its sources, the headers or the compiler changed.

Nothing here runs anything under it; that is launch.py.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

_HERE = Path(__file__).resolve().parent
_SOURCES = _HERE / "csrc"
_NVML_SOURCE = _SOURCES / "nvml" / "nvml.cpp"
_BUILD = _HERE / "build"
# The object also stands in for the driver: whoever opens libcuda.so.1 finds it by its soname.
_SONAME = "libcuda.so.1"
_NVML_SONAME = "libnvidia-ml.so.1"
# The C++ runtime is linked in and hidden, so that the object can be loaded into any process,
# whatever its own libstdc++ is.
_FLAGS = [
    "-std=c++17",
    "-O1",
    "-Wall",
    "-Wextra",
    "-fPIC",
    "-shared",
    f"-Wl,-soname,{_SONAME}",
    "-static-libstdc++",
    "-static-libgcc",
    f"-Wl,--version-script={_SOURCES / 'exports.map'}",
    "-Wl,-z,defs",
]


def _header_candidates() -> Iterator[Path]:
    """Folders that may hold the CUDA headers, in the order of preference."""
    torch = importlib.util.find_spec("torch")
    if torch is not None and torch.origin is not None:
        yield Path(torch.origin).parents[1] / "nvidia/cu13/include"
    for folder in sys.path:
        yield Path(folder) / "nvidia/cu13/include"
    for root in (os.environ.get("CUDA_HOME"), "/usr/local/cuda", os.environ.get("CONDA_PREFIX")):
        if root:
            yield Path(root) / "include"
            yield from sorted(Path(root).glob("targets/*/include"))


def find_headers() -> Path:
    """The folder of CUDA 13 headers to build against.

    Raises
    ------
    RuntimeError
        If no candidate has both the runtime's headers and ``crt/``.
    """
    for folder in _header_candidates():
        cuda = folder / "cuda.h"
        if not cuda.is_file() or not (folder / "crt/host_defines.h").is_file():
            continue
        version = re.search(r"#define CUDA_VERSION (\d+)", cuda.read_text(errors="replace"))
        if version and version.group(1).startswith("13"):
            return folder
    raise RuntimeError(
        "no CUDA 13 headers found: install nvidia-cuda-runtime and nvidia-cuda-crt "
        "(or a CUDA 13 toolkit, named by CUDA_HOME)"
    )


def _digest(compiler: str, headers: Path) -> str:
    state = hashlib.sha256()
    for source in sorted(path for path in _SOURCES.rglob("*") if path.is_file()):
        state.update(source.name.encode() + source.read_bytes())
    state.update(repr((compiler, _FLAGS)).encode())
    state.update((headers / "cuda.h").read_bytes())
    return state.hexdigest()[:16]


def _compile(command: list[str]) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "LD_PRELOAD"}
    result = subprocess.run(command, check=False, capture_output=True, text=True, env=environment)
    if result.returncode != 0:
        raise RuntimeError(f"building the simulator failed:\n{result.stderr}")


def build() -> list[Path]:
    """The shared objects, built if need be.

    Returns
    -------
    list of Path
        Of the objects to preload: CUDA's runtime and driver, and NVML.

    Raises
    ------
    RuntimeError
        If headers or compiler are missing, or the compiler fails (its output is in the message).
    """
    headers = find_headers()
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        raise RuntimeError("the simulator needs g++ (or the compiler that CXX names)")
    folder = _BUILD / _digest(compiler, headers)
    libraries = [folder / _SONAME, folder / _NVML_SONAME]
    _BUILD.mkdir(exist_ok=True)
    with (_BUILD / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # parallel test runs build once
        if folder.is_dir():
            return libraries
        partial = folder.with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        sources = [str(source) for source in sorted(_SOURCES.glob("*.cpp"))]
        _compile(
            [compiler, *_FLAGS, f"-I{headers}", *sources, "-o", str(partial / _SONAME), "-ldl"]
        )
        nvml = ["-shared", "-fPIC", f"-Wl,-soname,{_NVML_SONAME}", str(_NVML_SOURCE)]
        _compile([compiler, *nvml, "-o", str(partial / _NVML_SONAME)])
        partial.rename(folder)
        return libraries
