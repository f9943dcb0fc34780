from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from setuptools import build_meta

from build_backend import hooks, target_torch
from build_backend.stop import BuildStop
from build_backend.target_torch import TargetTorch
from tests.packaging.conftest import run, site_packages

_FITTING = TargetTorch("/site/torch", "2.12.1+cu130", "abc", "13.0", None, ("/site",))


def fake_torch(folder: Path, version: str, cuda: str | None = "13.0") -> Path:
    """Write as much of a torch as the build looks at, and its metadata for pip."""
    package = folder / "torch"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise AssertionError('the build imported torch')\n")
    (package / "version.py").write_text(
        f"__version__ = {version!r}\ncuda = {cuda!r}\ngit_version = 'abc'\nhip = None\n"
    )
    metadata = folder / f"torch-{version}.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: torch\nVersion: {version}\n")
    (metadata / "INSTALLER").write_text("vendor\n")
    (metadata / "RECORD").touch()
    return folder


def test_torch_in_use_is_described_as_it_describes_itself() -> None:
    found = target_torch.describe()
    assert found is not None
    assert found.version == torch.__version__
    assert found.git_version == torch.version.git_version
    assert found.cuda == torch.version.cuda
    assert found.include == Path(torch.__file__).parent / "include"
    assert target_torch.problem(found) is None


@pytest.mark.parametrize("through", ["site-packages", "dist-packages"])
def test_torch_of_an_environment_is_seen_through_pips_isolation(
    make_venv: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    through: str,
) -> None:
    if through == "site-packages":
        venv = make_venv()
        folder = fake_torch(site_packages(venv), "2.11.0a0+nv25")
    else:
        folder = fake_torch(tmp_path / "dist-packages", "2.11.0a0+nv25")
        venv = make_venv(folder)
    # What pip sets while it builds in isolation.
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("PYTHONNOUSERSITE", "1")
    found = target_torch.ask(str(venv / "bin" / "python"))
    assert found is not None
    assert found.folder == str(folder / "torch")
    assert str(folder) in found.search_path
    assert found.minor == (2, 11)
    assert target_torch.problem(found) is None


def test_torch_of_the_users_folder_is_seen_through_pips_isolation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = f"{sys.base_prefix}/bin/python{sys.version_info[0]}.{sys.version_info[1]}"
    user = tmp_path / f"lib/python{sys.version_info[0]}.{sys.version_info[1]}/site-packages"
    fake_torch(user, "2.11.0a0+nv25")
    monkeypatch.setenv("PYTHONUSERBASE", str(tmp_path))
    monkeypatch.setenv("PYTHONNOUSERSITE", "1")
    found = target_torch.ask(base)
    assert found is not None
    assert found.version == "2.11.0a0+nv25"


def test_torch_of_the_system_is_seen_through_an_environment_that_shows_it(tmp_path: Path) -> None:
    minor = f"python{sys.version_info[0]}.{sys.version_info[1]}"
    # Of what such an environment shows, the user's folder is where a test may write.
    fake_torch(tmp_path / "lib" / minor / "site-packages", "2.11.0a0+nv25")
    base, versions = f"{sys.base_prefix}/bin/{minor}", []
    for option in ("--system-site-packages", "--clear"):
        venv = tmp_path / option
        done = run(base, "-m", "venv", "--without-pip", option, venv, cwd=tmp_path)
        assert done.returncode == 0, done.stdout
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PYTHONUSERBASE", str(tmp_path))
            found = target_torch.ask(str(venv / "bin" / "python"))
        versions.append(found and found.version)
    assert versions == ["2.11.0a0+nv25", None]


def test_no_torch_is_one_sentence_with_the_command(
    make_venv: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    python = str(make_venv() / "bin" / "python")
    assert target_torch.ask(python) is None
    monkeypatch.setattr(target_torch, "find", lambda: None)
    with pytest.raises(BuildStop, match=r"has none: type .*-m pip install 'torch>=2.11,<2.16'"):
        hooks.get_requires_for_build_wheel()


def test_folder_called_torch_is_not_torch(make_venv: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "sources" / "torch").mkdir(parents=True)
    assert target_torch.ask(str(make_venv(tmp_path / "sources") / "bin" / "python")) is None


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"version": "2.10.0+cu130"},
            r"torch 2.10.0\+cu130 in /site is not supported: torch 2.11 to",
        ),
        ({"version": "2.16.0a0"}, "torch 2.16.0a0 in /site is not supported"),
        ({"version": "3.11.0"}, "torch 3.11.0 in /site is not supported"),
        ({"version": "unknown"}, "torch unknown in /site is not supported"),
        ({"cuda": None}, "is built without CUDA"),
        ({"cuda": None, "hip": "7.0"}, "is built for ROCm"),
        ({"cuda": "12.8"}, "is built for CUDA 12.8, and egm_alloc needs torch for CUDA 13"),
    ],
)
def test_unfit_torch_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, str | None], sentence: str
) -> None:
    unfit = dataclasses.replace(_FITTING, **changes)  # type: ignore[arg-type]
    monkeypatch.setattr(target_torch, "find", lambda: unfit)
    with pytest.raises(BuildStop, match=sentence) as stop:
        hooks.build_wheel("unused")
    assert "\n" not in str(stop.value)


@pytest.mark.parametrize("version", ["2.11.0a0+nv25", "2.11.0+cu130", "2.15.3"])
def test_supported_versions_fit(version: str) -> None:
    assert target_torch.problem(dataclasses.replace(_FITTING, version=version)) is None


@pytest.mark.parametrize("platform", ["darwin", "win32"])
def test_other_systems_are_one_sentence(monkeypatch: pytest.MonkeyPatch, platform: str) -> None:
    monkeypatch.setattr(sys, "platform", platform)
    with pytest.raises(BuildStop, match=r"^egm_alloc: only Linux is supported, and this is "):
        hooks.get_requires_for_build_wheel()


def test_torch_is_never_a_build_requirement(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build_meta, "get_requires_for_build_wheel", lambda _: ["theirs"])
    monkeypatch.setattr(build_meta, "get_requires_for_build_editable", lambda _: ["theirs"])
    needed = [*hooks.get_requires_for_build_wheel(), *hooks.get_requires_for_build_editable()]
    assert needed.count("theirs") == 2
    assert not any(requirement.startswith("torch") for requirement in needed)


def test_exposed_folders_come_last(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "path", ["first", "second"])
    target_torch.expose(["second", str(tmp_path), str(tmp_path)])
    assert sys.path == ["first", "second", str(tmp_path)]
