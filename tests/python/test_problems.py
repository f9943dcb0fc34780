"""What is in egm_alloc's way, found from what is given: environment, host, configuration."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

import egm_alloc
from egm_alloc import Config, DeviceDiagnosis, DeviceTraits, HostDiagnosis, machine
from egm_alloc.problems import (
    allocator_problems,
    configuration_problems,
    cuda_problem,
    environment_problems,
    host_problems,
)

GIB = 1 << 30
HEALTHY_HOST = HostDiagnosis(
    total_bytes=64 * GIB,
    available_bytes=32 * GIB,
    limited_by="MemAvailable",
    reserve_bytes=3 * GIB,
    promised_bytes=0,
    other_processes=0,
    others_bytes=0,
    sharing_problem=None,
    egm_bytes=None,
    numa_nodes=(0, 1),
    huge_pages="madvise",
    may_bind_memory=True,
    may_ask_for_pages=True,
)

ABLE = DeviceTraits(
    managed=True,
    concurrent_managed_access=True,
    pageable_memory_access=True,
    uses_host_page_tables=False,
    integrated=False,
    host_numa_vmm=True,
    registered_host_pointers=True,
    host_numa_node=0,
    hbm_numa_node=-1,
    egm_carveout=False,
)


def device(index: int = 0, auto_backing: str = "pinned", **unable: Any) -> DeviceDiagnosis:
    """Return a device that can do everything but what is given as False."""
    return DeviceDiagnosis(
        index=index,
        name="GPU",
        simulated=False,
        compute_capability="9.0",
        hbm_bytes=80 * GIB,
        traits=dataclasses.replace(ABLE, **unable),
        auto_backing=auto_backing,
        auto_reason="it suits",
    )


def test_cuda_that_does_not_come_up_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise RuntimeError("the driver is too old.\nMore about it.")

    monkeypatch.setattr(machine, "device_count", lambda: None)
    monkeypatch.setattr(torch.cuda, "init", fail)
    problem = cuda_problem()
    assert problem is not None
    assert problem.stops
    assert problem.what == "torch cannot bring CUDA up: the driver is too old"


@pytest.mark.simulated
def test_caching_that_is_switched_off_is_a_problem() -> None:
    torch.cuda.init()
    assert allocator_problems() == []
    torch.cuda.caching_allocator_enable(False)
    try:
        (problem,) = allocator_problems()
        works = egm_alloc.doctor().works
        with pytest.raises(RuntimeError, match="caching is off"):
            egm_alloc.enable()
    finally:
        torch.cuda.caching_allocator_enable(True)
    assert problem.stops
    assert not works
    assert "caching" in problem.what
    assert "torch.cuda.caching_allocator_enable(True)" in problem.remedy
    egm_alloc.enable()
    assert allocator_problems() == []


def test_no_problem_where_there_is_none() -> None:
    assert environment_problems({}) == []
    assert host_problems(HEALTHY_HOST) == []
    assert configuration_problems(Config(), [device(0), device(1)]) == []
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
        ({"reserve_bytes": 1 << 50}, "the reserve of 1048576.00 GiB leaves nothing"),
        ({"sharing_problem": "FILE cannot be opened: Permission denied"}, "FILE cannot be opened"),
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
    (problem,) = configuration_problems(Config(device=(0, 2)), [device(0), device(1)])
    assert problem.what == "device is 2, and this machine's last one is cuda:1"
    assert problem.stops


def test_only_devices_that_are_acted_on_matter() -> None:
    devices = [device(0, concurrent_managed_access=False), device(1)]
    assert len(configuration_problems(Config(), devices)) == 1
    assert configuration_problems(Config(device=(1,)), devices) == []
    assert configuration_problems(Config(backing="auto"), devices) == []


@pytest.mark.parametrize(
    ("backing", "missing", "word"),
    [
        ("numa", "host_numa_vmm", "cannot map memory of a host NUMA node"),
        ("split", "host_numa_vmm", "cannot map memory of a host NUMA node"),
        ("pinned", "registered_host_pointers", "only under another address"),
    ],
)
def test_backing_that_a_device_cannot_do_is_a_problem(
    backing: str, missing: str, word: str
) -> None:
    unable: dict[str, Any] = {missing: False}
    devices = [device(0), device(1, **unable)]
    (problem,) = configuration_problems(Config(backing=backing, spill=False), devices)
    assert problem.what.startswith("cuda:1 ")
    assert word in problem.what
    assert repr(backing) in problem.what
    assert problem.remedy == "set EGM_ALLOC_BACKING=auto"
    assert problem.stops
    assert configuration_problems(Config(backing=backing), [device(0)]) == []


@pytest.mark.parametrize("backing", ["managed", "device", "split", "auto"])
def test_spilling_that_a_device_cannot_do_is_a_problem(backing: str) -> None:
    devices = [device(auto_backing="managed", registered_host_pointers=False)]
    (problem,) = configuration_problems(Config(backing=backing), devices)
    assert "cannot be spilled to pinned memory" in problem.what
    assert "EGM_ALLOC_BACKING=numa" in problem.remedy
    assert "EGM_ALLOC_SPILL=0" in problem.remedy
    assert not problem.stops
    assert configuration_problems(Config(backing=backing, spill=False), devices) == []


def test_spilling_has_no_other_backing_where_the_driver_maps_no_host_memory() -> None:
    devices = [device(registered_host_pointers=False, host_numa_vmm=False)]
    (problem,) = configuration_problems(Config(), devices)
    assert problem.remedy == "set EGM_ALLOC_SPILL=0"


def test_spilling_goes_where_the_backing_is_on_the_host() -> None:
    devices = [device(auto_backing="numa", registered_host_pointers=False)]
    assert configuration_problems(Config(backing="numa"), devices) == []
    assert configuration_problems(Config(backing="auto"), devices) == []


def test_mode_managed_does_not_spill() -> None:
    devices = [device(registered_host_pointers=False)]
    assert configuration_problems(Config(mode="managed"), devices) == []
