"""Finds the torch that will run the extension, without importing it.

Only the standard library is used here: the file is also run by itself, by the interpreter that is
asked (see `find`). What the torch's headers declare is in `torch_features`.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import re
import runpy
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

OLDEST_MINOR = 11
NEWEST_MINOR = 15
REQUIREMENT = f"torch>=2.{OLDEST_MINOR},<2.{NEWEST_MINOR + 1}"

# What pip sets to shut the target environment out of an isolated build.
_ISOLATION_VARIABLES = ("PYTHONPATH", "PYTHONNOUSERSITE")


@dataclasses.dataclass(frozen=True)
class TargetTorch:
    """An installed torch, as its files describe it.

    Parameters
    ----------
    folder : str
        The folder of the package ``torch``.
    version : str
        The full version, with the local part, such as ``2.11.0+cu130``.
    git_version : str
        The revision it was built from.
    cuda : str or None
        The CUDA version it was built with; None without CUDA.
    hip : str or None
        The ROCm version it was built with; None without ROCm.
    search_path : tuple of str
        The import path of the interpreter that has it.
    """

    folder: str
    version: str
    git_version: str
    cuda: str | None
    hip: str | None
    search_path: tuple[str, ...]

    @property
    def include(self) -> Path:
        """The folder of torch's headers."""
        return Path(self.folder) / "include"

    @property
    def minor(self) -> tuple[int, int] | None:
        """Major and minor version; a vendor's ``2.11.0a0+...`` counts as 2.11."""
        match = re.match(r"(\d+)\.(\d+)", self.version)
        return (int(match[1]), int(match[2])) if match else None


def describe() -> TargetTorch | None:
    """Describe the torch that this interpreter would import.

    Returns
    -------
    TargetTorch or None
        None if it would import none.
    """
    spec = importlib.util.find_spec("torch")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        if not os.path.exists(os.path.join(folder, "version.py")):
            continue  # a folder that happens to be called torch
        facts = runpy.run_path(os.path.join(folder, "version.py"))
        return TargetTorch(
            folder=folder,
            version=str(facts["__version__"]),
            git_version=str(facts.get("git_version")),
            cuda=facts.get("cuda"),
            hip=facts.get("hip"),
            search_path=(*filter(os.path.isdir, filter(None, sys.path)), os.path.dirname(folder)),
        )
    return None


def ask(executable: str) -> TargetTorch | None:
    """Describe the torch that a plain run of another interpreter would import.

    Parameters
    ----------
    executable : str
        The interpreter. A virtual environment's counts with all it sees: system packages, the
        user's packages, ``.pth`` files.

    Returns
    -------
    TargetTorch or None
        None if it would import none.
    """
    environment = {k: v for k, v in os.environ.items() if k not in _ISOLATION_VARIABLES}
    answer = subprocess.run(
        [executable, __file__], env=environment, stdout=subprocess.PIPE, text=True, check=True
    )
    facts = json.loads(answer.stdout)
    if facts is None:
        return None
    facts["search_path"] = tuple(facts["search_path"])
    return TargetTorch(**facts)


def find(executable: str = sys.executable) -> TargetTorch | None:
    """Find the torch that will run the extension.

    Parameters
    ----------
    executable : str
        The interpreter that the extension is built for.

    Returns
    -------
    TargetTorch or None
        The torch that the build itself would import (no isolation, or a front end that puts the
        right one there), else the one of the target environment.

    Notes
    -----
    pip runs an isolated build with the interpreter of the target environment and hides that
    environment through variables; without these, the same interpreter sees it again.
    """
    return describe() or ask(executable)


def problem(torch: TargetTorch) -> str | None:
    """Say why egm_alloc cannot be built for a torch.

    Parameters
    ----------
    torch : TargetTorch
        The torch found.

    Returns
    -------
    str or None
        One sentence, or None if it fits.
    """
    here = f"torch {torch.version} in {os.path.dirname(torch.folder)}"
    if torch.minor is None or not (2, OLDEST_MINOR) <= torch.minor <= (2, NEWEST_MINOR):
        return (
            f"{here} is not supported: torch 2.{OLDEST_MINOR} to 2.{NEWEST_MINOR} are, so install "
            f"one of them in an environment of its own: pip install '{REQUIREMENT}'"
        )
    if torch.hip is not None:
        return f"{here} is built for ROCm, and egm_alloc needs torch for CUDA 13"
    if torch.cuda is None:
        return f"{here} is built without CUDA, and egm_alloc needs torch for CUDA 13"
    if torch.cuda.split(".")[0] != "13":
        return f"{here} is built for CUDA {torch.cuda}, and egm_alloc needs torch for CUDA 13"
    return None


def absence(executable: str = sys.executable) -> str:
    """Say that there is no torch, and what to type.

    Parameters
    ----------
    executable : str
        The interpreter that was asked.

    Returns
    -------
    str
        One sentence.
    """
    return (
        f"the extension is built for the torch that will run it, and {executable} has none: type "
        f"\"{executable} -m pip install '{REQUIREMENT}'\" first, or, if torch is in another "
        "environment, activate that one and type 'pip install --no-build-isolation .'"
    )


def expose(search_path: Iterable[str]) -> None:
    """Append folders to this interpreter's import path, after all that is there already.

    Parameters
    ----------
    search_path : iterable of str
        The folders; those already on the path stay where they are.
    """
    sys.path.extend(dict.fromkeys(folder for folder in search_path if folder not in sys.path))
    importlib.invalidate_caches()


if __name__ == "__main__":
    sys.path = [folder for folder in sys.path if folder != os.path.dirname(__file__)]
    found = describe()
    print(json.dumps(None if found is None else dataclasses.asdict(found)))
