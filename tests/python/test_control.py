"""Switching on and off: what is kept, what is refused, and that a refusal changes nothing."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch

import egm_alloc
from egm_alloc import machine
from tests.python.bad_values import BAD_VALUES
from tests.simulator import run_script

MIB, GIB = 1 << 20, 1 << 30


def tier_of(nbytes: int) -> str | None:
    """Allocate `nbytes` and return the tier they landed in."""
    return egm_alloc.info(torch.empty(nbytes, dtype=torch.uint8, device="cuda")).tier


@pytest.mark.simulated
@pytest.mark.parametrize(("field", "value", "error"), BAD_VALUES)
def test_bad_value_changes_nothing(field: str, value: Any, error: type[Exception]) -> None:
    egm_alloc.enable(threshold_gib=0.5)
    before = egm_alloc.get_config()
    with pytest.raises(error, match=rf"^{field} is "):
        egm_alloc.enable(**{"limit_gib": 3, field: value})
    assert egm_alloc.get_config() == before
    assert egm_alloc.is_enabled()
    assert tier_of(GIB // 2) == "extended"
    egm_alloc.enable(threshold_gib=1)
    assert tier_of(GIB // 2) == "device"


@pytest.mark.simulated
@pytest.mark.parametrize(("field", "value", "error"), BAD_VALUES)
def test_bad_value_leaves_off(field: str, value: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        egm_alloc.enable(**{field: value})
    assert not egm_alloc.is_enabled()
    assert egm_alloc.get_config() == egm_alloc.Config()


@pytest.mark.simulated
@pytest.mark.parametrize("device", [2, "cuda:5", [0, 2]])
def test_device_that_the_machine_lacks_is_refused(device: Any) -> None:
    with pytest.raises(ValueError, match=r"^device is \d; allowed: an index below 2"):
        egm_alloc.enable(device=device)
    assert not egm_alloc.is_enabled()
    egm_alloc.enable(device=1)
    assert egm_alloc.get_config() == egm_alloc.Config(device=(1,))


@pytest.mark.simulated
def test_positional_or_unknown_argument_is_refused() -> None:
    with pytest.raises(TypeError):
        egm_alloc.enable(1)  # type: ignore[call-arg]
    with pytest.raises(TypeError):
        egm_alloc.enable(treshold_gib=1)  # type: ignore[call-arg]
    assert not egm_alloc.is_enabled()
    egm_alloc.enable(threshold_gib=1)
    assert egm_alloc.get_config() == egm_alloc.Config(threshold_gib=1)


@pytest.mark.simulated
def test_fields_not_given_keep_their_value() -> None:
    egm_alloc.enable(threshold_gib=0.5, prefetch=False)
    egm_alloc.enable(preferred_location="host")
    assert egm_alloc.get_config() == egm_alloc.Config(
        threshold_gib=0.5, prefetch=False, preferred_location="host"
    )
    egm_alloc.disable()
    egm_alloc.enable()
    assert egm_alloc.get_config().threshold_gib == 0.5


@pytest.mark.simulated
def test_none_is_a_value_not_an_absence() -> None:
    egm_alloc.enable(preferred_location="host", limit_gib=4)
    egm_alloc.enable(preferred_location=None, limit_gib=None)
    assert egm_alloc.get_config().preferred_location is None
    assert egm_alloc.get_config().limit_gib is None


@pytest.mark.simulated
def test_keyword_beats_environment_beats_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EGM_ALLOC_THRESHOLD_GIB", "0.5")
    monkeypatch.setenv("EGM_ALLOC_PREFETCH", "0")
    egm_alloc.enable(threshold_gib=0.25)
    assert egm_alloc.get_config() == egm_alloc.Config(threshold_gib=0.25, prefetch=False)


@pytest.mark.simulated
def test_bad_environment_matters_only_for_fields_not_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EGM_ALLOC_THRESHOLD_GIB", "two")
    with pytest.raises(ValueError, match=r"^EGM_ALLOC_THRESHOLD_GIB is 'two'"):
        egm_alloc.enable()
    assert not egm_alloc.is_enabled()
    egm_alloc.enable(threshold_gib=1)
    assert egm_alloc.is_enabled()


@pytest.mark.simulated
def test_only_the_named_device_diverts() -> None:
    egm_alloc.enable(threshold_gib=0.5, device="cuda:1")
    assert tier_of(GIB) == "device"
    tensor = torch.empty(GIB, dtype=torch.uint8, device="cuda:1")
    assert egm_alloc.info(tensor).tier == "extended"


@pytest.mark.simulated
def test_uncached_torch_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTORCH_NO_CUDA_MEMORY_CACHING", "1")
    with pytest.raises(RuntimeError, match=r"PYTORCH_NO_CUDA_MEMORY_CACHING"):
        egm_alloc.enable()
    assert not egm_alloc.is_enabled()


@pytest.mark.simulated
def test_refusal_by_the_extension_is_one_line() -> None:
    result = run_script(
        """
import torch, egm_alloc
try:
    egm_alloc.enable()
except RuntimeError as error:
    print(str(error).count(chr(10)), error)
""",
        env={
            "EGM_ALLOC_AUTO_ENABLE": "0",
            "PYTORCH_CUDA_ALLOC_CONF": "backend:cudaMallocAsync",
        },
    )
    assert result.stdout.startswith("0 egm_alloc cannot be enabled")


@pytest.mark.simulated
def test_threads_that_switch_at_once_leave_one_of_their_states() -> None:
    thresholds = [0.25, 0.5, 1.0, 2.0]
    errors: list[BaseException] = []

    def switch(threshold: float) -> None:
        try:
            for _ in range(50):
                egm_alloc.enable(threshold_gib=threshold)
                egm_alloc.disable()
                egm_alloc.is_enabled()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=switch, args=(threshold,)) for threshold in thresholds]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert not egm_alloc.is_enabled()
    assert egm_alloc.get_config().threshold_gib in thresholds


def test_explicit_enable_without_driver_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "device_count", lambda: 0)
    monkeypatch.setattr(machine, "has_driver", lambda: False)
    with pytest.raises(RuntimeError, match=r"needs a CUDA GPU: no CUDA driver \(libcuda.so.1\)"):
        egm_alloc.enable()
    assert not egm_alloc.is_enabled()


def test_bad_argument_is_told_before_a_missing_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "device_count", lambda: 0)
    with pytest.raises(ValueError, match=r"^mode is "):
        egm_alloc.enable(mode="fast")


@pytest.mark.simulated
def test_child_forked_while_another_thread_enables_can_enable() -> None:
    result = run_script(
        """
import os, signal, threading, egm_alloc
from egm_alloc import machine
inside, go_on = threading.Event(), threading.Event()
count = machine.device_count
def slow_count():
    inside.set()
    go_on.wait()
    return count()
machine.device_count = slow_count
thread = threading.Thread(target=egm_alloc.enable, kwargs={"threshold_gib": 1})
thread.start()
inside.wait()
child = os.fork()
if child == 0:
    signal.alarm(20)  # ends a child that hangs
    machine.device_count = count
    egm_alloc.enable(threshold_gib=2)
    os._exit(0 if egm_alloc.get_config().threshold_gib == 2 else 1)
print("ended with", os.waitpid(child, 0)[1])
go_on.set()
thread.join()
print(egm_alloc.get_config().threshold_gib)
""",
        env={"EGM_ALLOC_AUTO_ENABLE": "0"},
    )
    assert result.stdout == "ended with 0\n1.0\n"
