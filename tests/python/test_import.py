"""What importing the package does, and does not do, on every kind of machine."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import egm_alloc
from tests.python.processes import run_without_gpu
from tests.simulator import run_script

IMPORT = """
import warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import egm_alloc
import torch
print(len(caught), *(f"{w.category.__name__}: {w.message}" for w in caught), sep="|")
print(egm_alloc.is_enabled(), torch.cuda.is_initialized())
"""

# What was wrong in the environment is not asked again for a field that is given.
IMPORT_AND_ENABLE = """
import torch, warnings
warnings.simplefilter("ignore")
import egm_alloc
egm_alloc.enable(threshold_gib=1, device="all", mode="tiered", backing="managed")
print(egm_alloc.info(torch.empty(1 << 30, dtype=torch.uint8, device="cuda")).tier)
"""


def imported(stdout: str) -> tuple[list[str], bool]:
    """Return the warnings that `IMPORT` printed and whether egm_alloc was on."""
    first, second = stdout.splitlines()[-2:]
    enabled, initialised = second.split()
    assert initialised == "False", "the import brought CUDA up"
    return first.split("|")[1:], enabled == "True"


def copy_package(target: Path) -> Path:
    """Copy the package, compiled part included, to be damaged."""
    package = target / "egm_alloc"
    shutil.copytree(Path(egm_alloc.__file__).parent, package)
    compiled = Path(egm_alloc._C.__file__)
    shutil.copy(compiled, package / compiled.name)
    return package


def import_error(folder: Path) -> str:
    """Import egm_alloc from `folder` and return the last line of the failure."""
    result = subprocess.run(
        [
            sys.executable,
            "-c",
            f"import sys; sys.path.insert(0, {str(folder)!r}); import egm_alloc",
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 1, "a crash, not an error" if result.returncode < 0 else "imported"
    return result.stderr.strip().splitlines()[-1]


@pytest.mark.simulated
def test_import_enables_without_a_word() -> None:
    assert imported(run_script(IMPORT, fresh=True).stdout) == ([], True)


@pytest.mark.simulated
def test_import_leaves_off_if_told() -> None:
    result = run_script(IMPORT, env={"EGM_ALLOC_AUTO_ENABLE": "0"})
    assert imported(result.stdout) == ([], False)
    bad = {"EGM_ALLOC_AUTO_ENABLE": "0", "EGM_ALLOC_MODE": "none"}
    warned, enabled = imported(run_script(IMPORT, env=bad).stdout)
    assert not enabled
    assert len(warned) == 1
    assert warned[0].startswith("RuntimeWarning: egm_alloc has its defaults: EGM_ALLOC_MODE is ")


@pytest.mark.simulated
@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"EGM_ALLOC_AUTO_ENABLE": "maybe"}, ["EGM_ALLOC_AUTO_ENABLE is 'maybe'", "allowed: 1"]),
        ({"EGM_ALLOC_THRESHOLD_GIB": "-1"}, ["EGM_ALLOC_THRESHOLD_GIB is '-1'", "allowed: "]),
        ({"EGM_ALLOC_DEVICE": "7"}, ["EGM_ALLOC_DEVICE is 7", "below 2"]),
        (
            {"EGM_ALLOC_MODE": "managed", "EGM_ALLOC_BACKING": "device"},
            ["backing is 'device'", "'managed'"],
        ),
        ({"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}, ["PYTORCH_NO_CUDA_MEMORY_CACHING"]),
    ],
)
def test_import_warns_once_and_stays_off(variables: dict[str, str], words: list[str]) -> None:
    warned, enabled = imported(run_script(IMPORT, env=variables, devices=2).stdout)
    assert not enabled
    assert len(warned) == 1
    assert warned[0].startswith("RuntimeWarning: egm_alloc is off: ")
    for word in words:
        assert word in warned[0]
    if "PYTORCH_NO_CUDA_MEMORY_CACHING" not in variables:
        ran = run_script(IMPORT_AND_ENABLE, env=variables, devices=2)
        assert ran.stdout.splitlines()[-1] == "extended"


@pytest.mark.simulated
def test_unknown_variable_is_a_warning_and_no_more() -> None:
    result = run_script(IMPORT, env={"EGM_ALLOC_TRESHOLD_GIB": "1"})
    warned, enabled = imported(result.stdout)
    assert enabled
    assert len(warned) == 1
    assert "EGM_ALLOC_TRESHOLD_GIB" in warned[0]
    assert "EGM_ALLOC_THRESHOLD_GIB" in warned[0]


@pytest.mark.simulated
def test_environment_sets_the_configuration() -> None:
    result = run_script(
        "import egm_alloc; print(egm_alloc.get_config())",
        env={"EGM_ALLOC_THRESHOLD_GIB": "0.25", "EGM_ALLOC_DEVICE": "1"},
        devices=2,
    )
    assert "threshold_gib=0.25, device=(1,)" in result.stdout


def test_import_without_gpu_warns_once_and_stays_off() -> None:
    result = run_without_gpu(IMPORT)
    assert result.returncode == 0, result.stderr
    warned, enabled = imported(result.stdout)
    assert not enabled
    assert len(warned) == 1
    assert warned[0].startswith("RuntimeWarning: egm_alloc is off: egm_alloc needs a CUDA GPU: ")


@pytest.mark.simulated
@pytest.mark.parametrize("machine", ["no-gpu", "no-driver"])
def test_import_on_a_machine_without_either_warns_once_and_stays_off(machine: str) -> None:
    env = {"EGM_ALLOC_AUTO_ENABLE": None, "PYTHONWARNINGS": None}
    result = run_script(IMPORT, machine=machine, env=env)
    (warned,), enabled = imported(result.stdout)
    assert not enabled
    assert warned.startswith("RuntimeWarning: egm_alloc is off: egm_alloc needs a CUDA GPU: ")


def test_everything_but_enable_works_without_gpu() -> None:
    result = run_without_gpu(
        """
import egm_alloc, torch
egm_alloc.disable()
assert not egm_alloc.is_enabled()
assert egm_alloc.get_config() == egm_alloc.Config()
assert egm_alloc.stats().extended_tier.reserved_bytes == 0
egm_alloc.reset_peak_stats()
assert "off" in egm_alloc.memory_summary()
for attempt in range(2):
    try:
        egm_alloc.enable()
    except RuntimeError as error:
        assert str(error).startswith("egm_alloc needs a CUDA GPU: "), error
        assert "\\n" not in str(error)
    else:
        raise AssertionError
try:
    egm_alloc.info(torch.ones(1))
except ValueError:
    print("done", torch.ones(2).sum().item())
""",
        EGM_ALLOC_AUTO_ENABLE="0",
    )
    assert result.stdout == "done 2.0\n", result.stderr


def test_other_torch_is_one_sentence_and_no_crash(tmp_path: Path) -> None:
    package = copy_package(tmp_path)
    (package / "_build_info.py").write_text('TORCH_VERSION = "2.10.0"\nTORCH_GIT_VERSION = "x"\n')
    assert import_error(tmp_path).startswith(
        "ImportError: this egm_alloc was built for torch 2.10.0, but torch "
    )


@pytest.mark.parametrize("missing", ["_build_info.py", "_C*.so"])
def test_source_tree_that_is_not_built_says_so(tmp_path: Path, missing: str) -> None:
    package = copy_package(tmp_path)
    for file in package.glob(missing):
        file.unlink()
    assert import_error(tmp_path).startswith("ImportError: egm_alloc is not built here: run ")
