"""Whether the extension fits the torch at hand, told before it is imported.

A binary built for another torch may load and then call the wrong functions: the allocator
interface moves with every minor version and no symbol betrays it. Hence this check.
"""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Protocol


class BuildInfo(Protocol):
    """What the build records in ``_build_info.py``."""

    TORCH_VERSION: str
    TORCH_GIT_VERSION: str


_SOURCES = Path(__file__).parents[1] / "setup.py"


def _remedy() -> str:
    if _SOURCES.exists():
        return (
            "it was built in the source tree: go to another folder if egm_alloc is installed too, "
            "or build it here again with 'make env'"
        )
    return "rebuild it with 'pip install --force-reinstall --no-deps .' in its source tree"


def check(build_info: BuildInfo, torch: ModuleType) -> None:
    """Refuse a torch other than the one that the extension was built for.

    Parameters
    ----------
    build_info : module
        The generated ``egm_alloc._build_info``.
    torch : module
        The torch at hand.

    Raises
    ------
    ImportError
        If torch is built without CUDA or for ROCm, or its version or git revision is not the
        recorded one.
    """
    version = torch.version
    here = torch.__version__
    if version.hip is not None:
        raise ImportError(f"egm_alloc needs torch for CUDA; torch {here} here is built for ROCm")
    if version.cuda is None:
        raise ImportError(
            f"egm_alloc needs torch for CUDA; torch {here} here is built without CUDA"
        )
    if str(here) != build_info.TORCH_VERSION:
        raise ImportError(
            f"this egm_alloc was built for torch {build_info.TORCH_VERSION}, but torch {here} is "
            f"here: {_remedy()}"
        )
    revision = version.git_version
    if revision != build_info.TORCH_GIT_VERSION:
        raise ImportError(
            f"this egm_alloc was built for revision {build_info.TORCH_GIT_VERSION} of torch "
            f"{here}, but revision {revision} is here: {_remedy()}"
        )
