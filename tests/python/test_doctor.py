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
from egm_alloc import _C, Config
from egm_alloc.cli import main
from egm_alloc.host import diagnose_host
from tests.python.processes import run_without_gpu
from tests.simulator import run_script, sim
from tests.simulator.host import write_host

GIB = 1 << 30
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
        (
            "h200",
            {"EGM_ALLOC_BACKING": "split", "EGM_SIM_HOST_NUMA_VMM": "0"},
            "cuda:0 cannot map memory of a host NUMA node",
            "EGM_ALLOC_BACKING=auto",
        ),
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
    assert (host.promised_bytes, host.sharing_problem) == (0, None)
    with egm_alloc.place("managed"):
        egm_alloc.enable(preferred_location="host")
        tensor = torch.empty(64 << 20, dtype=torch.uint8, device="cuda")
    assert egm_alloc.doctor().host.promised_bytes == tensor.numel()


@pytest.mark.simulated
def test_everything_of_the_host_is_of_the_simulated_one(tmp_path: Path) -> None:
    host = egm_alloc.doctor().host
    assert (host.numa_nodes, host.huge_pages) == ((0,), "madvise")
    write_host(tmp_path, 64, 32)
    (tmp_path / "sys/devices/system/node/online").write_text("0-1,8\n")
    (tmp_path / "sys/kernel/mm/transparent_hugepage/enabled").write_text("always madvise [never]")
    (tmp_path / "sys/module/nvidia").mkdir(parents=True)
    (tmp_path / "sys/module/nvidia/version").write_text("580.65.06\n")
    sim.set_host_root(tmp_path)
    diagnosis = egm_alloc.doctor()
    host = diagnosis.host
    assert (host.numa_nodes, host.huge_pages) == ((0, 1, 8), "never")
    assert (host.total_bytes, host.available_bytes) == (64 * GIB, 32 * GIB)
    assert diagnosis.driver_version == "580.65.06"


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
