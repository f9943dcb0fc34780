"""Builds and installs the package for real, into scratch environments."""

from __future__ import annotations

import os
import platform
import shutil
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from build_backend import cuda_headers
from tests.packaging.conftest import copy_tree, hide_toolkit, run, site_packages
from tests.packaging.test_target_torch import fake_torch

_IMPORT = "import egm_alloc; print(egm_alloc._build_info.TORCH_VERSION, egm_alloc.__file__)"


def packages_without_crt(folders: list[str], target: Path) -> Path:
    """Make a folder in which all packages are seen but the headers of nvidia-cuda-crt."""
    branch = ("nvidia", "cu13", "include")

    def show(source: Path, shown: Path, depth: int) -> None:
        shown.mkdir(exist_ok=True)
        for entry in source.iterdir():
            if depth < len(branch) and entry.name == branch[depth]:
                show(entry, shown / entry.name, depth + 1)
            elif depth < len(branch) or entry.name != "crt":
                link = shown / entry.name
                if not link.exists() and not entry.name.startswith("nvidia_cuda_crt"):
                    link.symlink_to(entry)

    for folder in folders:
        show(Path(folder), target, 0)
    return target


@pytest.fixture
def stub_tree(tmp_path: Path) -> Path:
    return copy_tree(tmp_path / "stub", csrc=False)


@pytest.fixture(scope="module")
def stub_wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tree = copy_tree(tmp_path_factory.mktemp("wheel") / "stub", csrc=False)
    command = "from build_backend import hooks; hooks.build_wheel('.')"
    done = run(sys.executable, "-c", command, cwd=tree)
    assert done.returncode == 0, done.stdout
    (wheel,) = tree.glob("*.whl")
    return wheel


def test_isolated_install_builds_against_the_torch_that_is_there_without_a_toolkit(
    make_venv: Callable[..., Path], torch_folders: list[str], tmp_path: Path
) -> None:
    venv = make_venv(packages_without_crt(torch_folders, tmp_path / "packages"))
    python = venv / "bin" / "python"
    download = ["-m", "pip", "download", "--quiet", "--no-deps", "--retries", "0", "--dest"]
    if run(python, *download, tmp_path / "downloads", "ninja", cwd=tmp_path).returncode:
        pytest.skip("needs a package registry for the isolated build's setuptools")
    tree = copy_tree(tmp_path / "tree", csrc=True)
    hide_toolkit(tree)

    done = run(python, "-m", "pip", "install", "--verbose", ".", cwd=tree)

    assert done.returncode == 0, done.stdout
    assert "Collecting torch" not in done.stdout
    assert "nvidia-cuda-crt" in done.stdout
    assert "/usr/local/cuda/" not in done.stdout
    assert "csrc/bindings/module.cpp" in done.stdout
    imported = run(python, "-c", _IMPORT, cwd=tmp_path, EGM_ALLOC_AUTO_ENABLE="0")
    assert imported.returncode == 0, imported.stdout
    assert imported.stdout.split() == [
        torch.__version__,
        str(site_packages(venv) / "egm_alloc/__init__.py"),
    ]
    assert {path.name for path in site_packages(venv).glob("torch*")} == set()


def test_headers_of_a_toolkit_are_what_is_built_with(
    torch_folders: list[str], stub_tree: Path, tmp_path: Path
) -> None:
    # A toolkit's headers, with a mark, in a folder where no package looks.
    cuda = torch.version.cuda
    assert cuda is not None
    folders = cuda_headers.include_folders(cuda, torch_folders, os.environ, platform.machine())
    include = tmp_path / "toolkit" / "include"
    for folder in map(Path, folders):
        shutil.copytree(folder, include, dirs_exist_ok=True)
    header = include / "cuda_runtime_api.h"
    header.write_text("#define EGM_ALLOC_TEST_TOOLKIT\n" + header.read_text())
    stub = stub_tree / "csrc" / "stub.cpp"
    wanted = "#ifndef EGM_ALLOC_TEST_TOOLKIT\n#error the toolkit was passed over\n#endif\n"
    stub.write_text(stub.read_text() + wanted)
    command = "from build_backend import hooks; hooks.build_wheel('.')"

    def build(**variables: str) -> tuple[int, bool]:
        done = run(sys.executable, "-c", command, cwd=stub_tree, **variables)
        return done.returncode, "the toolkit was passed over" in done.stdout

    assert build(CUDA_HOME=str(include.parent)) == (0, False)
    returncode, passed_over = build()
    assert returncode != 0
    assert passed_over


def test_install_without_isolation_needs_no_network(
    make_venv: Callable[..., Path], torch_folders: list[str], stub_tree: Path
) -> None:
    venv = make_venv(*torch_folders)
    install = ["-m", "pip", "install", "--no-index", "--no-deps", "--no-build-isolation", "."]
    done = run(venv / "bin" / "python", *install, cwd=stub_tree)
    assert done.returncode == 0, done.stdout
    package = site_packages(venv) / "egm_alloc"
    assert (package / "_C.pyi").exists()
    assert (package / "py.typed").exists()
    assert (package / "include" / "egm_alloc.h").exists()
    assert f"TORCH_VERSION: str = {torch.__version__!r}" in (package / "_build_info.py").read_text()


@pytest.mark.parametrize("version", ["2.10.0", "2.16.0"])
@pytest.mark.parametrize("editable", [[], ["--editable"]], ids=["wheel", "editable"])
def test_unfit_torch_ends_an_install_before_another_is_looked_for(
    make_venv: Callable[..., Path],
    torch_folders: list[str],
    stub_tree: Path,
    version: str,
    editable: list[str],
) -> None:
    venv = make_venv(*torch_folders)
    fake_torch(site_packages(venv), version)
    install = ["-m", "pip", "install", "--no-index", "--no-build-isolation", *editable, "."]
    done = run(venv / "bin" / "python", *install, cwd=stub_tree)
    assert done.returncode != 0
    assert f"torch {version}" in done.stdout
    assert "Could not find a version" not in done.stdout
    assert "No matching distribution" not in done.stdout


def test_vendors_torch_satisfies_the_wheel(
    make_venv: Callable[..., Path], stub_wheel: Path, tmp_path: Path
) -> None:
    venv = make_venv()
    fake_torch(site_packages(venv), "2.11.0a0+nv25")
    done = run(
        venv / "bin" / "python",
        *["-m", "pip", "install", "--dry-run", "--no-index", "--isolated"],
        stub_wheel,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stdout
    assert "Would install egm-alloc-0.1.0\n" in done.stdout + "\n"
    assert "(2.11.0a0+nv25)" in done.stdout


def test_torch_beyond_the_supported_ones_does_not_satisfy_the_wheel(
    make_venv: Callable[..., Path], stub_wheel: Path, tmp_path: Path
) -> None:
    venv = make_venv()
    fake_torch(site_packages(venv), "2.16.0")
    install = ["-m", "pip", "install", "--dry-run", "--no-index", "--isolated"]
    done = run(venv / "bin" / "python", *install, stub_wheel, cwd=tmp_path)
    assert done.returncode != 0
    assert "torch<2.16,>=2.11.0a0" in done.stdout


def test_wheel_is_for_this_python_and_platform(stub_wheel: Path) -> None:
    tag = f"cp{sys.version_info[0]}{sys.version_info[1]}"
    assert stub_wheel.name.startswith(f"egm_alloc-0.1.0-{tag}-{tag}-linux_")
    names = zipfile.ZipFile(stub_wheel).namelist()
    assert not any(name.startswith(("build_backend", "tests", "csrc")) for name in names)
    assert {"egm_alloc_command.py", "egm_alloc/__main__.py", "egm_alloc/cli/doctor.py"} <= set(
        names
    )


def test_source_archive_holds_what_a_build_and_the_tests_need(stub_tree: Path) -> None:
    (stub_tree / "tests").mkdir()
    (stub_tree / "tests" / "test_something.py").touch()
    command = "from build_backend import hooks; hooks.build_sdist('.')"
    done = run(sys.executable, "-c", command, cwd=stub_tree)
    assert done.returncode == 0, done.stdout
    (source_archive,) = stub_tree.glob("*.tar.gz")
    with tarfile.open(source_archive) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {
        "csrc/stub.cpp",
        "csrc/c_api/egm_alloc.h",
        "build_backend/hooks.py",
        "tests/test_something.py",
        "pyproject.toml",
        "setup.py",
    } <= names
