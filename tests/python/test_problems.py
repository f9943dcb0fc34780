"""What is in egm_alloc's way, found from what is given: environment, host, configuration."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import egm_alloc
from egm_alloc import Config, HostDiagnosis, machine
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
    (problem,) = configuration_problems(Config(device=(0, 2)), [True, True])
    assert problem.what == "device is 2, and this machine's last one is cuda:1"
    assert problem.stops


def test_only_devices_that_are_acted_on_matter() -> None:
    concurrent = [False, True]
    assert len(configuration_problems(Config(), concurrent)) == 1
    assert configuration_problems(Config(device=(1,)), concurrent) == []
    assert configuration_problems(Config(backing="auto"), concurrent) == []
