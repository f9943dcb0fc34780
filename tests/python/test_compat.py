"""A torch that the extension was not built for is refused in one sentence."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from egm_alloc import _build_info, _compat

BUILD: Any = SimpleNamespace(TORCH_VERSION="2.11.0+cu130", TORCH_GIT_VERSION="abc")


def fake_torch(
    version: str = "2.11.0+cu130",
    revision: str = "abc",
    cuda: str | None = "13.0",
    hip: str | None = None,
) -> Any:
    """Return what the check looks at of a torch."""
    return SimpleNamespace(
        __version__=version,
        version=SimpleNamespace(git_version=revision, cuda=cuda, hip=hip),
    )


def test_same_torch_is_accepted() -> None:
    _compat.check(BUILD, fake_torch())


def test_torch_at_hand_is_accepted() -> None:
    _compat.check(_build_info, torch)


@pytest.mark.parametrize(
    ("here", "words"),
    [
        (fake_torch(version="2.12.1+cu130"), ["torch 2.11.0+cu130", "2.12.1+cu130", "make env"]),
        (fake_torch(version="2.11.0+cu126"), ["2.11.0+cu126"]),
        (fake_torch(version="2.11.0a0+5228986c39.nv26.01"), ["2.11.0a0+5228986c39.nv26.01"]),
        (fake_torch(revision="def"), ["revision abc", "revision def", "make env"]),
        (fake_torch(version="2.11.0+cpu", cuda=None), ["without CUDA"]),
        (fake_torch(version="2.11.0+rocm6.4", cuda=None, hip="6.4"), ["ROCm"]),
    ],
)
def test_other_torch_is_refused_in_one_sentence(here: Any, words: list[str]) -> None:
    with pytest.raises(ImportError) as caught:
        _compat.check(BUILD, here)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def test_remedy_of_an_installed_one_is_to_install_it_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(_compat, "_SOURCES", tmp_path / "setup.py")
    with pytest.raises(ImportError, match="pip install --force-reinstall --no-deps"):
        _compat.check(BUILD, fake_torch(revision="def"))
