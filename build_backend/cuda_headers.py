"""Finds CUDA's headers: an installed toolkit's, else those of CUDA's pip packages.

Pure but for looking at files; nothing here runs a compiler or installs anything.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from build_backend.stop import BuildStop

DEFAULT_TOOLKIT = Path("/usr/local/cuda")

# One header of each part that is packaged separately.
_RUNTIME = "cuda_runtime_api.h"  # pip: nvidia-cuda-runtime, which torch requires
_CRT = "crt/host_defines.h"  # pip: nvidia-cuda-crt, which torch does not require

_TARGETS = {"x86_64": "x86_64-linux", "aarch64": "sbsa-linux"}


def toolkit_folders(environment: Mapping[str, str], machine: str) -> Iterator[Path]:
    """List the folders where a toolkit may keep its headers, the most explicit first.

    Parameters
    ----------
    environment : mapping of str to str
        The environment variables.
    machine : str
        The processor, as ``platform.machine()`` names it.

    Yields
    ------
    Path
        A folder, which need not exist.
    """
    roots = [environment.get(name) for name in ("CUDA_HOME", "CUDA_PATH", "CONDA_PREFIX")]
    for root in [*(Path(root) for root in roots if root), DEFAULT_TOOLKIT]:
        yield root / "include"
        if machine in _TARGETS:
            yield root / "targets" / _TARGETS[machine] / "include"


def package_folders(search_path: Iterable[str], major: int) -> list[Path]:
    """List the folders of headers from CUDA's pip packages.

    Parameters
    ----------
    search_path : iterable of str
        The import path that the packages are looked for on.
    major : int
        CUDA's major version.

    Returns
    -------
    list of Path
        Existing folders, each once. Runtime and crt may lie in different ones.
    """
    folders = (Path(entry) / "nvidia" / f"cu{major}" / "include" for entry in search_path)
    return [folder for folder in dict.fromkeys(folders) if folder.is_dir()]


def major_version(folder: Path) -> int | None:
    """Read CUDA's major version off its headers.

    Parameters
    ----------
    folder : Path
        A folder that may hold them.

    Returns
    -------
    int or None
        None if it does not hold the runtime's header.
    """
    try:
        text = (folder / _RUNTIME).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    match = re.search(r"^\s*#\s*define\s+CUDART_VERSION\s+(\d+)", text, re.MULTILINE)
    return int(match[1]) // 1000 if match else None


def _has(folders: Iterable[Path], header: str) -> bool:
    return any((folder / header).is_file() for folder in folders)


def find(
    cuda: str, search_path: Iterable[str], environment: Mapping[str, str], machine: str
) -> tuple[list[Path], list[str]]:
    """Find the headers that match a CUDA version.

    Parameters
    ----------
    cuda : str
        The CUDA version that torch was built with, such as ``"13.0"``.
    search_path : iterable of str
        The import path that pip packages are looked for on.
    environment : mapping of str to str
        The environment variables.
    machine : str
        The processor, as ``platform.machine()`` names it.

    Returns
    -------
    folders : list of Path
        What goes on the compiler's include path.
    missing : list of str
        The pip packages that complete them; empty if nothing is missing.
    """
    version = ".".join(cuda.split(".")[:2])
    major = int(version.split(".")[0])
    for folder in toolkit_folders(environment, machine):
        if major_version(folder) == major and _has([folder], _CRT):
            return [folder], []
    folders = package_folders(search_path, major)
    missing = []
    if not _has(folders, _RUNTIME):
        missing.append(f"nvidia-cuda-runtime=={version}.*")
    if not _has(folders, _CRT):
        missing.append(f"nvidia-cuda-crt=={version}.*")
    return folders, missing


def include_folders(
    cuda: str, search_path: Iterable[str], environment: Mapping[str, str], machine: str
) -> list[Path]:
    """Find the headers that match a CUDA version, or end the build.

    Parameters
    ----------
    cuda, search_path, environment, machine
        As for `find`.

    Returns
    -------
    list of Path
        What goes on the compiler's include path.

    Raises
    ------
    BuildStop
        If headers are missing; it says which packages to install.
    """
    folders, missing = find(cuda, search_path, environment, machine)
    if missing:
        major = cuda.partition(".")[0]
        packages = " ".join(f"'{package}'" for package in missing)
        raise BuildStop(
            f'no headers of CUDA {major} here: type "pip install {packages}", or '
            "set CUDA_HOME to a toolkit of that version"
        )
    return folders
