"""What `doctor` says of a machine, and the command that prints it."""

from __future__ import annotations

import dataclasses
import json
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch

import egm_alloc
from egm_alloc import _C, Config, HostDiagnosis, machine
from egm_alloc.cli import main
from egm_alloc.host import diagnose_host
from egm_alloc.problems import (
    configuration_problems,
    cuda_problem,
    environment_problems,
    host_problems,
)
from tests.python.processes import run_without_gpu
from tests.simulator import run_script, sim

GIB = 1 << 30
HEALTHY_HOST = HostDiagnosis(
    total_bytes=64 * GIB,
    available_bytes=32 * GIB,
    limited_by="MemAvailable",
    reserve_bytes=3 * GIB,
    egm_bytes=None,
    numa_nodes=(0, 1),
    huge_pages="madvise",
    may_bind_memory=True,
    may_ask_for_pages=True,
)
DOCTOR = "import sys; from egm_alloc.cli import main; sys.exit(main(['doctor']))"


@pytest.mark.simulated
def test_devices_are_described() -> None:
    egm_alloc.enable(threshold_gib=1)
    diagnosis = egm_alloc.doctor()
    assert diagnosis.works
    assert diagnosis.enabled
    assert diagnosis.config == Config(threshold_gib=1)
    assert diagnosis.torch_version == torch.__version__
    assert diagnosis.driver_cuda_version == "13.0"
    assert [device.index for device in diagnosis.devices] == [0, 1]
    first = diagnosis.devices[0]
    assert (first.name, first.simulated) == ("Simulated H200", True)
    assert first.hbm_bytes == 8 * GIB
    assert first.compute_capability == "9.0"
    assert first.traits.concurrent_managed_access
    assert not first.traits.uses_host_page_tables
    assert (first.traits.host_numa_node, first.traits.hbm_numa_node) == (0, -1)
    assert first.auto_backing == "pinned"
    assert "PCIe" in first.auto_reason


@pytest.mark.simulated
def test_carve_out_changes_what_auto_means() -> None:
    result = run_script(DOCTOR, machine="gh200-egm")
    assert re.search(r"EGM carve-out +400.00 GiB\n", result.stdout)
    assert re.search(r'backing "auto" +numa: .* \(EGM\)', result.stdout)


@pytest.mark.simulated
def test_coherent_machine_shows_its_nodes() -> None:
    script = "import egm_alloc; print(egm_alloc.doctor().devices[0].traits)"
    traits = run_script(script, machine="gh200").stdout
    assert "uses_host_page_tables=True" in traits
    assert "hbm_numa_node=1" in traits


def test_diagnosis_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        egm_alloc.doctor().problems = ()  # type: ignore[misc]


@pytest.mark.simulated
def test_text_fits_a_terminal_and_says_simulated(capsys: pytest.CaptureFixture[str]) -> None:
    egm_alloc.enable(device="cuda:1")
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"egm_alloc {egm_alloc.__version__}: on\n")
    assert max(map(len, text.splitlines())) <= 100
    assert text.count("SIMULATED") == sim.devices
    assert "cuda:1: Simulated H200" in text
    assert 'backing "auto"' in text
    assert "(1,)" in text


@pytest.mark.simulated
def test_json_has_every_field(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EGM_ALLOC_TRESHOLD_GIB", "1")
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    diagnosis = egm_alloc.doctor()
    assert set(found) == {"works", *(field.name for field in dataclasses.fields(diagnosis))}
    assert found["works"] is True
    assert found["config"]["threshold_gib"] == 2
    assert found["devices"] == [dataclasses.asdict(device) for device in diagnosis.devices]
    assert [p["what"] for p in found["problems"]] == [p.what for p in diagnosis.problems]


@pytest.mark.simulated
def test_module_is_the_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["egm_alloc", "doctor", "--json"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("egm_alloc", run_name="__main__")
    assert ended.value.code == 0
    assert json.loads(capsys.readouterr().out)["works"]


def test_without_a_gpu_it_says_so_and_fails() -> None:
    result = run_without_gpu(DOCTOR, EGM_ALLOC_AUTO_ENABLE="0")
    assert result.returncode == 1
    assert result.stdout.startswith(f"egm_alloc {egm_alloc.__version__}: off")
    assert "stops egm_alloc: no " in result.stdout
    assert "remedy: " in result.stdout
    assert "Traceback" not in result.stderr


@pytest.mark.simulated
@pytest.mark.parametrize(
    ("machine_name", "variables", "what", "remedy"),
    [
        ("no-gpu", {}, "the CUDA driver reports no GPU", "nvidia-smi"),
        ("no-managed", {}, "cuda:0 cannot use managed memory", "EGM_ALLOC_BACKING=auto"),
        (
            "h200",
            {"PYTORCH_CUDA_ALLOC_CONF": "backend:cudaMallocAsync"},
            "torch's allocator is 'cudaMallocAsync'",
            "unset backend:cudaMallocAsync",
        ),
        ("h200", {"EGM_ALLOC_MODE": "fast"}, "EGM_ALLOC_MODE is 'fast'", "set EGM_ALLOC_MODE"),
    ],
)
def test_problem_is_named_with_its_remedy(
    machine_name: str, variables: dict[str, str], what: str, remedy: str
) -> None:
    env = {"PYTHONWARNINGS": "ignore", "EGM_ALLOC_AUTO_ENABLE": None, **variables}
    result = run_script(DOCTOR, machine=machine_name, env=env, check=False)
    stops = machine_name != "no-managed"
    assert result.returncode == (1 if stops else 0), result.stderr
    words = " ".join(result.stdout.split())
    assert ("stops egm_alloc: " if stops else "- ") + what in words
    assert remedy in words.partition(what)[2]


def test_cuda_that_does_not_come_up_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise RuntimeError("the driver is too old.\nMore about it.")

    monkeypatch.setattr(machine, "device_count", lambda: None)
    monkeypatch.setattr(torch.cuda, "init", fail)
    problem = cuda_problem()
    assert problem is not None
    assert problem.stops
    assert problem.what == "torch cannot bring CUDA up: the driver is too old"


def test_no_problem_where_there_is_none() -> None:
    assert environment_problems({}) == []
    assert host_problems(HEALTHY_HOST) == []
    assert configuration_problems(Config(), [True, True]) == []
    assert configuration_problems(None, []) == []


@pytest.mark.parametrize(
    ("name", "value", "what", "stops"),
    [
        ("EGM_ALLOC_THRESHOLD_GIB", "two", "EGM_ALLOC_THRESHOLD_GIB is 'two'; allowed: ", True),
        ("EGM_ALLOC_BACKING", "hbm", "EGM_ALLOC_BACKING is 'hbm'; allowed: ", True),
        ("EGM_ALLOC_AUTO_ENABLE", "maybe", "EGM_ALLOC_AUTO_ENABLE is 'maybe'; allowed: ", True),
        ("EGM_ALLOC_TRESHOLD", "1", "EGM_ALLOC_TRESHOLD means nothing", False),
        ("PYTORCH_NO_CUDA_MEMORY_CACHING", "1", "PYTORCH_NO_CUDA_MEMORY_CACHING turns off", True),
        (
            "TORCH_NCCL_USE_TENSOR_REGISTER_ALLOCATOR_HOOK",
            "True",
            "TORCH_NCCL_USE_TENSOR_REGISTER_ALLOCATOR_HOOK registers every segment",
            False,
        ),
    ],
)
def test_variable_is_a_problem(name: str, value: str, what: str, stops: bool) -> None:
    (problem,) = environment_problems({name: value})
    assert problem.what.startswith(what)
    assert problem.stops == stops
    assert problem.remedy
    for text in (problem.what, problem.remedy):
        assert not text.endswith(".")


def test_every_wrong_variable_is_named_at_once() -> None:
    names = ["EGM_ALLOC_THRESHOLD_GIB", "EGM_ALLOC_LIMIT_GIB", "EGM_ALLOC_PREFETCH"]
    problems = environment_problems(dict.fromkeys(names, "x"))
    assert [problem.what.partition(" ")[0] for problem in problems] == [
        "EGM_ALLOC_THRESHOLD_GIB",
        "EGM_ALLOC_PREFETCH",
        "EGM_ALLOC_LIMIT_GIB",
    ]


def test_variables_that_contradict_each_other_are_a_problem() -> None:
    (problem,) = environment_problems({"EGM_ALLOC_MODE": "managed", "EGM_ALLOC_BACKING": "auto"})
    assert "backing is 'auto'" in problem.what
    assert problem.stops


def test_hook_that_is_off_is_no_problem() -> None:
    assert environment_problems({"TORCH_NCCL_USE_TENSOR_REGISTER_ALLOCATOR_HOOK": "0"}) == []


@pytest.mark.simulated
def test_wrong_variable_does_not_stop_what_is_on() -> None:
    egm_alloc.enable()
    (problem,) = environment_problems({"EGM_ALLOC_BACKING": "hbm"})
    assert not problem.stops


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"huge_pages": "never"}, "huge pages"),
        ({"may_bind_memory": False}, "mbind"),
        ({"may_ask_for_pages": False}, "move_pages"),
    ],
)
def test_host_that_forbids_something_is_a_problem(change: dict[str, object], word: str) -> None:
    (problem,) = host_problems(dataclasses.replace(HEALTHY_HOST, **change))  # type: ignore[arg-type]
    assert word in problem.what
    assert not problem.stops


def test_single_node_needs_no_binding() -> None:
    host = dataclasses.replace(HEALTHY_HOST, numa_nodes=(0,), may_bind_memory=False)
    assert host_problems(host) == []


def test_configured_device_that_is_missing_is_a_problem() -> None:
    (problem,) = configuration_problems(Config(device=(0, 2)), [True, True])
    assert problem.what == "device is 2, and this machine's last one is cuda:1"
    assert problem.stops


def test_only_devices_that_are_acted_on_matter() -> None:
    concurrent = [False, True]
    assert len(configuration_problems(Config(), concurrent)) == 1
    assert configuration_problems(Config(device=(1,)), concurrent) == []
    assert configuration_problems(Config(backing="auto"), concurrent) == []


def test_host_is_read_from_the_kernel(tmp_path: Path) -> None:
    files = {
        "sys/kernel/mm/transparent_hugepage/enabled": "always madvise [never]\n",
        "sys/devices/system/node/online": "0-1,8\n",
    }
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True)
        path.write_text(text)
    host = diagnose_host(str(tmp_path))
    assert host.numa_nodes == (0, 1, 8)
    assert host.huge_pages == "never"


def test_host_that_says_nothing_is_unknown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise RuntimeError("/proc/meminfo says nothing")

    monkeypatch.setattr(_C, "host_memory", fail)
    host = diagnose_host(str(tmp_path))
    assert (host.total_bytes, host.available_bytes, host.huge_pages) == (None, None, None)
    assert host.numa_nodes == ()


@pytest.mark.simulated
def test_memory_is_what_the_allocator_goes_by() -> None:
    egm_alloc.enable(host_reserve_gib=7)
    host = egm_alloc.doctor().host
    assert (host.total_bytes, host.reserve_bytes) == (512 * GIB, 7 * GIB)
    assert host.available_bytes == _C.host_memory()["available_bytes"]
    assert host.limited_by == "MemAvailable"
    assert host.egm_bytes is None


def test_command_says_why_egm_alloc_cannot_be_imported() -> None:
    result = run_without_gpu(
        """
import sys, torch
torch.__version__ = "2.99.0"
import egm_alloc_command
sys.exit(egm_alloc_command.main())
"""
    )
    assert result.returncode == 1
    assert result.stderr.startswith("egm-alloc: this egm_alloc was built for torch ")
    assert len(result.stderr.splitlines()) == 1


def test_unknown_command_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["heal"])
    assert ended.value.code == 2
    assert "doctor" in capsys.readouterr().err
