from __future__ import annotations

from pathlib import Path

import pytest

from build_backend import cuda_headers
from build_backend.stop import BuildStop


def make_headers(folder: Path, version: int, crt: bool = True) -> Path:
    folder.mkdir(parents=True)
    (folder / "cuda_runtime_api.h").write_text(f"#define CUDART_VERSION  {version}\n")
    if crt:
        (folder / "crt").mkdir()
        (folder / "crt" / "host_defines.h").touch()
    return folder


@pytest.fixture(autouse=True)
def no_default_toolkit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(cuda_headers, "DEFAULT_TOOLKIT", tmp_path / "default")
    return tmp_path / "default"


@pytest.mark.parametrize("variable", ["CUDA_HOME", "CUDA_PATH", "CONDA_PREFIX"])
@pytest.mark.parametrize(
    ("machine", "below"),
    [
        ("x86_64", "include"),
        ("x86_64", "targets/x86_64-linux/include"),
        ("aarch64", "include"),
        ("aarch64", "targets/sbsa-linux/include"),
    ],
)
def test_toolkit_found_by_variable(tmp_path: Path, variable: str, machine: str, below: str) -> None:
    folder = make_headers(tmp_path / "toolkit" / below, 13020)
    environment = {variable: str(tmp_path / "toolkit")}
    assert cuda_headers.find("13.0", [], environment, machine) == ([folder], [])


def test_default_toolkit_found_without_variables(no_default_toolkit: Path) -> None:
    folder = make_headers(no_default_toolkit / "include", 13000)
    assert cuda_headers.find("13.0", [], {}, "x86_64") == ([folder], [])


def test_toolkit_of_another_processor_is_passed_over(tmp_path: Path) -> None:
    make_headers(tmp_path / "targets/sbsa-linux/include", 13000)
    assert cuda_headers.find("13.0", [], {"CUDA_HOME": str(tmp_path)}, "x86_64")[0] == []


def test_toolkit_of_another_major_version_is_passed_over(
    tmp_path: Path, no_default_toolkit: Path
) -> None:
    make_headers(tmp_path / "old/include", 12080)
    right = make_headers(no_default_toolkit / "include", 13000)
    found = cuda_headers.find("13.0", [], {"CUDA_HOME": str(tmp_path / "old")}, "x86_64")
    assert found == ([right], [])


def test_toolkit_without_crt_is_passed_over(tmp_path: Path) -> None:
    make_headers(tmp_path / "include", 13000, crt=False)
    assert cuda_headers.find("13.0", [], {"CUDA_HOME": str(tmp_path)}, "x86_64")[0] == []


def test_packages_are_used_without_a_toolkit(tmp_path: Path) -> None:
    folder = make_headers(tmp_path / "nvidia/cu13/include", 13000)
    assert cuda_headers.find("13.0", [str(tmp_path)], {}, "x86_64") == ([folder], [])


def test_crt_may_lie_in_another_environment_than_the_runtime(tmp_path: Path) -> None:
    runtime = make_headers(tmp_path / "target/nvidia/cu13/include", 13000, crt=False)
    crt = tmp_path / "overlay/nvidia/cu13/include"
    (crt / "crt").mkdir(parents=True)
    (crt / "crt/host_defines.h").touch()
    path = [str(tmp_path / "target"), str(tmp_path / "overlay")]
    assert cuda_headers.find("13.0", path, {}, "x86_64") == ([runtime, crt], [])


def test_missing_crt_is_named_with_torchs_version_of_cuda(tmp_path: Path) -> None:
    make_headers(tmp_path / "nvidia/cu13/include", 13020, crt=False)
    _, missing = cuda_headers.find("13.2", [str(tmp_path)], {}, "x86_64")
    assert missing == ["nvidia-cuda-crt==13.2.*"]


def test_no_headers_at_all_is_one_sentence_with_the_command() -> None:
    with pytest.raises(BuildStop) as stop:
        cuda_headers.include_folders("13.0", [], {}, "x86_64")
    assert str(stop.value) == (
        "egm_alloc: no headers of CUDA 13 here: type \"pip install 'nvidia-cuda-runtime==13.0.*' "
        "'nvidia-cuda-crt==13.0.*'\", or set CUDA_HOME to a toolkit of that version"
    )
