"""Counting devices without bringing CUDA up."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch

from egm_alloc import machine
from tests.simulator import run_script


@pytest.fixture
def cuda_down(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the process look as if CUDA were not initialised and NVML missing."""
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    monkeypatch.setattr(torch.cuda, "_device_count_nvml", lambda: -1)


@pytest.mark.simulated
def test_simulated_machine_has_two_devices() -> None:
    assert machine.device_count() == 2


@pytest.mark.simulated
@pytest.mark.usefixtures("cuda_down")
def test_count_comes_from_a_process_of_its_own_without_nvml() -> None:
    assert machine.device_count() == 2


@pytest.mark.simulated
def test_counting_leaves_cuda_down_and_forks_possible() -> None:
    result = run_script(
        """
import os, torch
from egm_alloc import machine
assert machine.device_count() == 2
assert not torch.cuda.is_initialized()
child = os.fork()
if child == 0:
    torch.ones(1, device="cuda")
    os._exit(0)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
""",
        env={"EGM_ALLOC_AUTO_ENABLE": "0"},
        devices=2,
    )
    assert result.stdout.strip() == "0"


def test_nvml_is_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    monkeypatch.setattr(torch.cuda, "_device_count_nvml", lambda: 3)
    assert machine.device_count() == 3


@pytest.mark.usefixtures("cuda_down")
def test_no_driver_means_no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "has_driver", lambda: False)
    assert machine.device_count() == 0
    assert machine.why_no_device() == "no CUDA driver (libcuda.so.1) was found"


@pytest.mark.usefixtures("cuda_down")
@pytest.mark.parametrize("error", [OSError(), subprocess.TimeoutExpired("python", 60)])
def test_count_is_unknown_if_the_process_fails(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(machine, "has_driver", lambda: True)
    monkeypatch.setattr(subprocess, "run", fail)
    assert machine.device_count() is None


@pytest.mark.usefixtures("cuda_down")
def test_count_is_unknown_in_an_embedded_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "has_driver", lambda: True)
    monkeypatch.setattr(sys, "executable", "")
    assert machine.device_count() is None


def test_hidden_gpus_are_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "has_driver", lambda: True)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    assert "CUDA_VISIBLE_DEVICES is '-1'" in machine.why_no_device()
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert machine.why_no_device() == "the CUDA driver reports no GPU"
