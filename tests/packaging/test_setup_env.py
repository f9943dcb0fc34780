from __future__ import annotations

import dataclasses
import os
import re
import subprocess
from pathlib import Path

import pytest

from build_backend import target_torch
from build_backend.target_torch import TargetTorch
from scripts import setup_env
from tests.packaging.conftest import ROOT, site_packages

_VENDORS = TargetTorch("/opt/site/torch", "2.11.0a0+nv25", "abc", "13.0", None, ("/opt/site",))


@pytest.fixture(autouse=True)
def vendors_torch_is_active(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(target_torch, "describe", lambda: _VENDORS)


def test_empty_cxx_is_the_usual_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "")
    setup_env.check_machine()


def test_make_hands_on_no_empty_cxx() -> None:
    for compiler, kept in (("", []), ("g++", ["CXX=g++"])):
        result = subprocess.run(
            ["make", "--eval", "show: ; @env", "show"],
            cwd=ROOT,
            env={**os.environ, "CXX": compiler},
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        assert [line for line in result.stdout.splitlines() if line.startswith("CXX=")] == kept


@pytest.mark.parametrize("wanted", [None, "2.11"])
def test_active_torch_is_used_if_it_fits(wanted: str | None) -> None:
    assert setup_env.active_torch(wanted) == _VENDORS


def test_active_torch_is_left_alone_if_another_is_asked_for(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert setup_env.active_torch("2.12") is None
    assert "torch 2.12 is asked for" in capsys.readouterr().out


def test_environment_sees_the_active_packages_and_installs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(setup_env, "pip_install", lambda *_: pytest.fail("pip was run"))
    setup_env.make_venv(tmp_path / "venv", setup_env.active_torch(None))
    pth = site_packages(tmp_path / "venv") / "active_environment.pth"
    assert pth.read_text() == "/opt/site\n"


def test_environment_of_the_users_own_is_left_alone(tmp_path: Path) -> None:
    own = site_packages(tmp_path / "venv") / "torch" / "__init__.py"
    own.parent.mkdir(parents=True)
    own.touch()
    with pytest.raises(SystemExit, match=r"venv was not made by this command: activate, move or"):
        setup_env.make_venv(tmp_path / "venv", None)
    assert own.exists()


def test_environment_is_made_again_for_another_torch(tmp_path: Path) -> None:
    for folder in ("/opt/site", "/opt/other"):
        borrowed = dataclasses.replace(_VENDORS, search_path=(folder,))
        setup_env.make_venv(tmp_path / "venv", borrowed)
        pth = site_packages(tmp_path / "venv") / "active_environment.pth"
        assert pth.read_text() == f"{folder}\n"


def test_test_tools_are_those_of_the_extra() -> None:
    extra = re.search(r"^test = \[(.*)\]$", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert extra is not None
    assert re.findall(r'"(.*?)"', extra[1]) == list(setup_env.TEST_TOOLS.values())
